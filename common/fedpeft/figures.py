"""Figures: what training and evaluation report, a number by name; how many there may be, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpeft.errors import MetricsInvalid

MAX_TRAINING = 64
"""Most figures of an update."""
MAX_EVALUATION = 2048
"""Most figures of an evaluation."""
MAX_NAME_BYTES = 128


def sendable(figures: Mapping[str, float], most: int) -> dict[str, float]:
    """Returns the first `most` figures that pass `check`; a class name may be longer than a figure's name may be."""
    kept = [(n, float(value)) for n, value in figures.items() if _named(n) and math.isfinite(value)]
    return dict(kept[:most])


def check(figures: Mapping[str, float], most: int) -> None:
    """Checks figures from outside.

    Raises:
        MetricsInvalid: If there are more than `most`, a name is empty or too long, or a value is not finite.
    """
    if len(figures) > most:
        raise MetricsInvalid(f"{len(figures)} figures; at most {most} are taken")
    for name, value in figures.items():
        if not _named(name):
            raise MetricsInvalid(f"a figure's name has {len(name.encode())} bytes; 1 to {MAX_NAME_BYTES} are taken")
        if not math.isfinite(value):
            raise MetricsInvalid(f"the figure {name} is {value}")


def _named(name: str) -> bool:
    return 1 <= len(name.encode()) <= MAX_NAME_BYTES
