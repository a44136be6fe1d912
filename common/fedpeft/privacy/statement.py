"""The guarantee of a run as it is shown: who is protected, against which change, and with what epsilon and delta."""

from __future__ import annotations

from typing import Any

EPSILON = "privacy_epsilon"
"""Figure of a round: epsilon of the run up to it."""
UNITS = {
    "central": ("client", "zero-out"),
    "local": ("client", "replace"),
    "example": ("example", "add or remove one"),
}
"""Unit of protection and neighbouring relation, by mechanism; docs/privacy.md says what they mean."""
_NOISE = {
    "central": "central noise",
    "local": "local noise",
    "example": "noise in every step of training, of the client that spent most",
}


def statement(
    mechanism: str, delta: float, epsilon: float, noise_multiplier: float | None, target_epsilon: float | None
) -> dict[str, Any]:
    """Returns the guarantee as it stands in JSON.

    Args:
        mechanism: `privacy.mechanism` of the run.
        delta: `privacy.delta`.
        epsilon: Spent by the committed rounds; where clients keep their budgets, by the one that spent most.
        noise_multiplier: Of the run; None where each client has its own.
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
    return f"{spent}, unit: {stated['unit']} ({stated['relation']}), {_NOISE.get(stated['mechanism'], 'noise')}"
