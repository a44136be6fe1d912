"""Figures of one adapter version from several evaluators, made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeft.rounds.metric_values import MAX_EVALUATION

EXAMPLES = "examples"
"""The figure that weighs the others: how many examples were scored."""


def merged(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each figure over the evaluators that gave it, and the sum of their examples.

    Means are weighted by examples if every evaluator says how many it scored, else all count alike. There are no more
    figures than one evaluator may give, those of the whole before those of single classes: evaluators may name others.
    """
    counts = [max(f.get(EXAMPLES, 0.0), 0.0) for f in figures]
    weights = counts if all(counts) else [1.0] * len(figures)
    result: dict[str, float] = {}
    names = sorted({name for f in figures for name in f}, key=lambda name: ("/" in name, name))
    for name in sorted(names[:MAX_EVALUATION]):
        given = [(f[name], w) for f, w in zip(figures, weights, strict=True) if name in f]
        if len(given) == 1:
            result[name] = given[0][0]
        elif name == EXAMPLES:
            result[name] = sum(value for value, _ in given)
        else:
            # Shares first, so that no evaluator's figure, however large, makes the mean infinite.
            largest = max(w for _, w in given)
            total = sum(w / largest for _, w in given)
            result[name] = sum(value * (w / largest / total) for value, w in given)
    return result
