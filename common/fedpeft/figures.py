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
        MetricsInvalid: If there are more than `most`, a name is empty or too long, or a value is not finite; its field
            is `metrics`, or `metrics[NAME]`.
    """
    if len(figures) > most:
        raise _fault("metrics", f"has {len(figures)} figures; at most {most} are taken")
    for name, value in figures.items():
        if not _named(name):
            raise _fault("metrics", f"has a name of {len(name.encode())} bytes; 1 to {MAX_NAME_BYTES} are taken")
        if not math.isfinite(value):
            raise _fault(f"metrics[{name}]", f"is {value}, not a finite number")


def _fault(field: str, text: str) -> MetricsInvalid:
    return MetricsInvalid(f"{field} {text}", ((field, text),))


def _named(name: str) -> bool:
    return 1 <= len(name.encode()) <= MAX_NAME_BYTES
