"""The guarantee of a run as it is shown: who is protected, against which change, and with what epsilon and delta."""

from __future__ import annotations

from typing import Any

EPSILON = "privacy_epsilon"
"""Figure of a round: epsilon of the run up to it."""
UNITS = {"central": ("client", "zero-out"), "local": ("client", "replace")}
"""Unit of protection and neighbouring relation, by mechanism; docs/privacy.md says what they mean."""


def statement(
    mechanism: str, delta: float, epsilon: float, noise_multiplier: float, target_epsilon: float | None
) -> dict[str, Any]:
    """Returns the guarantee as it stands in JSON.

    Args:
        mechanism: `privacy.mechanism` of the run.
        delta: `privacy.delta`.
        epsilon: Spent by the committed rounds.
        noise_multiplier: Of the run.
        target_epsilon: Its limit; None without one.
    """
    unit, relation = UNITS.get(mechanism, ("", ""))
    return {
        "mechanism": mechanism,
        "unit": unit,
        "relation": relation,
        "epsilon": epsilon,
        "delta": delta,
        "target_epsilon": target_epsilon,
        "noise_multiplier": noise_multiplier,
    }


def in_words(stated: dict[str, Any]) -> str:
    """Returns a statement as one line of text."""
    limit = "" if stated["target_epsilon"] is None else f" of {stated['target_epsilon']:g}"
    spent = f"epsilon {stated['epsilon']:.3g}{limit} spent at delta {stated['delta']:g}"
    return f"{spent}, unit: {stated['unit']} ({stated['relation']}), {stated['mechanism']} noise"
