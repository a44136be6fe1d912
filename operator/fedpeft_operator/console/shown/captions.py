"""Captions of the charts: a sentence for those who do not see them, and for those who do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.narration import names
from fedpeft_operator.console.feeds.facts import RoundFacts
from fedpeft_operator.console.shown.outliers import FACTOR, norms, times
from fedpeft_operator.console.shown.series import spent

MOST_ODD = 6


def captions(rounds: Sequence[RoundFacts], initial: Mapping[str, float]) -> dict[str, str]:
    """Returns a sentence for each chart of a run."""
    committed = [facts for facts in rounds if facts.is_committed]
    return {
        "accuracy": _accuracy(committed, initial),
        "loss": _loss(committed),
        "spent": _spent(committed, initial),
        "bytes": _bytes(committed),
        "norms": _norms(rounds),
    }


def _accuracy(committed: Sequence[RoundFacts], initial: Mapping[str, float]) -> str:
    scores = [(0, initial["accuracy"])] if "accuracy" in initial else []
    scores += [(facts.number, facts.metrics["accuracy"]) for facts in committed if "accuracy" in facts.metrics]
    if not scores and any(views.is_scored(metrics) for metrics in (initial, *(facts.metrics for facts in committed))):
        return "Versions are scored by loss only."
    if not scores:
        return "No version has been scored. To score versions, run fedpeft-client --evaluate with held-out data."
    (first, begun), (last, now) = scores[0], scores[-1]
    if first == last:
        return f"Version {last} scored {formatting.percent(now)}."
    best, most = max(scores, key=lambda score: score[1])
    beside = "" if best == last else f"; best was version {best} with {formatting.percent(most)}"
    return f"From {formatting.percent(begun)} (version {first}) to {formatting.percent(now)} (version {last}){beside}."


def _loss(committed: Sequence[RoundFacts]) -> str:
    said = []
    for name, words in (("train_loss", "Training loss"), ("loss", "held-out loss")):
        values = [facts.metrics[name] for facts in committed if name in facts.metrics]
        if values:
            said.append(f"{words} from {values[0]:.3f} to {values[-1]:.3f}")
    return "; ".join(said) + ", in nats." if said else "No round has been committed yet."


def _bytes(committed: Sequence[RoundFacts]) -> str:
    if not committed:
        return "No round has been committed yet."
    last = committed[-1]
    up, down = formatting.size(last.up), formatting.size(last.down)
    said = f"Round {last.number}: {up} up (above the line), {down} down (below it)"
    if not last.full:
        return said + "."
    return f"{said}; full fine-tuning would have sent {formatting.size(last.full)} each way."


def _spent(committed: Sequence[RoundFacts], initial: Mapping[str, float]) -> str:
    points = spent(committed, initial)
    if not points or not points[-1][0]:
        return "No version has been scored since a round was committed."
    best = max(points, key=lambda point: point[1])
    sent, accuracy = points[-1]
    beside = (
        "" if best[1] == accuracy else f"; the best, {formatting.percent(best[1])}, after {formatting.size(best[0])}"
    )
    full = sum(facts.full for facts in committed)
    against = f". Full fine-tuning would have sent {formatting.size(2 * full)}" if full else ""
    return f"{formatting.percent(accuracy)} after {formatting.size(sent)} in both directions{beside}{against}."


def _norms(rounds: Sequence[RoundFacts]) -> str:
    found = list(norms(rounds))
    if not found:
        return "No update has been received yet."
    odd: dict[str, list[float]] = {}
    for norm in found:
        if norm.is_odd and norm.ratio is not None:
            odd.setdefault(norm.client, []).append(norm.ratio)
    updates = formatting.counted(len(found), "update")
    if not odd:
        return f"{updates}; all norms lie within a factor of {FACTOR:.0f} of the median of their round."
    said = [f"{client} ({len(ratios)}, {times(max(ratios))} the median)" for client, ratios in odd.items()]
    return f"{updates}; outliers: {names(sorted(said)[:MOST_ODD])}."
