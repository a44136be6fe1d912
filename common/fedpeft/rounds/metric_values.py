"""Figures: what training and evaluation report, a number by name; how many, what they are called, what they range over.

Names that this version knows have a range (`RANGES`); a task may report others, which are finite and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedpeft.errors import MetricsInvalid
from fedpeft.untrusted_text import plain

MAX_TRAINING = 64
"""Most figures of an update."""
MAX_EVALUATION = 2048
"""Most figures of an evaluation."""
MAX_NAME_BYTES = 128
FAULTS_NAMED = 16
"""Most figures that a refusal names: there may be thousands."""

SHARE = (0.0, 1.0)
NOT_NEGATIVE = (0.0, math.inf)
RANGES: Mapping[str, tuple[float, float]] = {
    "accuracy": SHARE,
    "clip_factor": SHARE,
    "loss": NOT_NEGATIVE,
    "loss_first": NOT_NEGATIVE,
    "loss_last": NOT_NEGATIVE,
    "examples": NOT_NEGATIVE,
    "seconds": NOT_NEGATIVE,
    "images_per_second": NOT_NEGATIVE,
    "steps": NOT_NEGATIVE,
    "skipped_images": NOT_NEGATIVE,
    "micro_batch": NOT_NEGATIVE,
    "threads": NOT_NEGATIVE,
    "gpu_memory_bytes": NOT_NEGATIVE,
}
"""Lowest and highest value of the figures that this version knows, both included."""
ACCURACY_OF_CLASS = "accuracy/"
"""Begins the name of a class's accuracy, which is a share as well."""
COUNT = "examples"
"""Number of examples that the others are about: no result by itself."""


def sendable(figures: Mapping[str, float], most: int) -> tuple[dict[str, float], tuple[str, ...]]:
    """Divides figures into those that pass `check` and the others.

    Returns:
        The first `most` figures that pass, and why each of the others does not: a value may not be finite, and a class
        name may be longer than a figure's name may be.
    """
    kept: dict[str, float] = {}
    dropped = list[str]()
    for name, value in figures.items():
        fault = _fault(name, value)
        if not fault and len(kept) >= most:
            fault = f"the figure {plain(name)} is one of more than {most}"
        if fault:
            dropped.append(fault)
        else:
            kept[name] = float(value)
    return kept, tuple(dropped)


def check(figures: Mapping[str, float], most: int) -> None:
    """Checks figures from outside.

    Raises:
        MetricsInvalid: If there are more than `most`, a name is empty or too long, or a value is not finite or outside
            the range of its name; with each such figure as a field.
    """
    if len(figures) > most:
        fault = f"{len(figures)} figures; at most {most} are taken"
        raise MetricsInvalid(fault, (("metrics", fault),))
    faults = [(_field(name), fault) for name, value in figures.items() if (fault := _fault(name, value))]
    if faults:
        more = f"; {len(faults) - 1} more figures are wrong" if len(faults) > 1 else ""
        raise MetricsInvalid(faults[0][1] + more, tuple(faults[:FAULTS_NAMED]))


def check_evaluation(figures: Mapping[str, float]) -> None:
    """Checks the figures of an evaluation, which is worth nothing without a result.

    Raises:
        MetricsInvalid: As `check`; and if there is no figure besides the count of examples.
    """
    check(figures, MAX_EVALUATION)
    if not figures.keys() - {COUNT}:
        fault = "no result; give at least one figure besides examples, for example accuracy or loss"
        raise MetricsInvalid(fault, (("metrics", fault),))


def _fault(name: str, value: float) -> str:
    """Returns what is wrong with a figure; empty if nothing is."""
    size = len(name.encode())
    if not 1 <= size <= MAX_NAME_BYTES:
        return f"a figure's name has {size} bytes; 1 to {MAX_NAME_BYTES} are taken"
    shown = plain(name)
    if not math.isfinite(value):
        return f"the figure {shown} is {value}; it must be finite"
    low, high = SHARE if name.startswith(ACCURACY_OF_CLASS) else RANGES.get(name, (-math.inf, math.inf))
    if not low <= value <= high:
        right = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
        return f"the figure {shown} is {value:g}; {right} is taken"
    return ""


def _field(name: str) -> str:
    """Returns the path of a figure, as AIP-193 has it for an entry of a map."""
    return f"metrics[{plain(name[:MAX_NAME_BYTES])}]"
