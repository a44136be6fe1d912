"""The curves of a run, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedpeft_operator.console.feeds.facts import RoundFacts
from fedpeft_operator.console.shown.outliers import Norm, norms

MOST_POINTS = 400
"""Rounds of a curve that are drawn."""
MOST_NORMS = 1200
"""Updates of the norm view that are drawn, beside those that stand out."""

Json = dict[str, Any]


def series(rounds: Sequence[RoundFacts], initial: Mapping[str, float]) -> Json:
    """Returns what the charts of a run draw, as JSON."""
    committed = [facts for facts in rounds if facts.is_committed]
    return {
        "accuracy": _curve(committed, {"accuracy": _metric("accuracy")}, initial),
        "loss": _curve(committed, {"loss": _metric("loss"), "train_loss": _metric("train_loss")}, initial),
        "spent": _spent(committed, initial),
        "bytes": _curve(committed, {"up": lambda r: r.up or None, "down": lambda r: r.down or None}),
        "norms": scatter(list(norms(rounds))),
    }


def scatter(found: Sequence[Norm], client: str = "") -> Json:
    """Returns norms as points, those that stand out, or are of `client`, apart from the others; many are thinned."""
    apart = [norm for norm in found if (norm.client == client if client else norm.is_odd)]
    usual = [norm for norm in found if not (norm.client == client if client else norm.is_odd)]
    step = -(-len(usual) // MOST_NORMS) or 1
    return {"usual": [_point(norm) for norm in usual[::step]], "apart": [_point(norm) for norm in apart[-MOST_NORMS:]]}


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Returns at most about `most` points: of each stretch its lowest and its highest, and always the ends."""
    if len(points) <= most:
        return list(points)
    width = -(-len(points) * 2 // most)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept.add(min(stretch, key=lambda point: point[1]))
        kept.add(max(stretch, key=lambda point: point[1]))
    return sorted(kept)


def spent(rounds: Sequence[RoundFacts], initial: Mapping[str, float]) -> list[tuple[int, float]]:
    """Returns the accuracy of each version that was scored, as (bytes sent up and down until then, accuracy)."""
    points, sent = [(0, initial["accuracy"])] if "accuracy" in initial else [], 0
    for facts in rounds:
        sent += facts.up + facts.down
        if "accuracy" in facts.metrics:
            points.append((sent, facts.metrics["accuracy"]))
    return points


def _spent(committed: Sequence[RoundFacts], initial: Mapping[str, float]) -> Json:
    points = thinned(spent(committed, initial))
    return {"x": [sent for sent, _ in points], "accuracy": [_rounded(accuracy) for _, accuracy in points]}


def _metric(name: str) -> Callable[[RoundFacts], float | None]:
    return lambda facts: facts.metrics.get(name)


def _curve(
    rounds: Sequence[RoundFacts],
    lines: Mapping[str, Callable[[RoundFacts], float | None]],
    initial: Mapping[str, float] | None = None,
) -> Json:
    """Returns lines over the numbers of rounds; a round that one of them lacks has null there."""
    found: dict[str, dict[int, float]] = {}
    for name, value in lines.items():
        points = [(0, initial[name])] if initial and name in initial else []
        points += [(facts.number, at) for facts in rounds if (at := value(facts)) is not None]
        found[name] = dict(points)
    numbers = {number for points in found.values() for number, _ in thinned(sorted(points.items()))}
    x = sorted(numbers)
    return {"x": x, **{name: [_rounded(points.get(number)) for number in x] for name, points in found.items()}}


def _point(norm: Norm) -> list[Any]:
    ratio = None if norm.ratio is None else _rounded(norm.ratio)
    return [norm.round, _rounded(norm.norm), norm.client, ratio]


def _rounded(value: float | None) -> float | None:
    """Returns a value with the digits that a screen can show."""
    return None if value is None else float(f"{value:.6g}")
