"""Figures: what training and evaluation report, a number by name; how many, what they are called, what they range over.

Names that this version knows have a range (`RANGES`): no client's figure makes a sum infinite, or lower. A
task may report others, which are finite and no more.
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

ROLLED_BACK_TO = "rolled_back_to"
"""Figure of a round that folded nothing: the version whose tensors it has."""

SHARE = (0.0, 1.0)
LOSS = (0.0, 1e6)
COUNTED = (0.0, float(2**32))
RANGES: Mapping[str, tuple[float, float]] = {
    "accuracy": SHARE,
    "clip_factor": SHARE,
    "loss": LOSS,
    "loss_first": LOSS,
    "loss_last": LOSS,
    "examples": (0.0, 1e15),
    "seconds": (0.0, 366 * 86_400.0),
    "images_per_second": (0.0, 1e9),
    "steps": COUNTED,
    "skipped_images": COUNTED,
    "micro_batch": COUNTED,
    "threads": COUNTED,
    "gpu_memory_bytes": (0.0, 1e15),
    "privacy_epsilon": (0.0, 1e12),
    "privacy_noise_multiplier": (0.0, 1e12),
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
        return f"the figure {shown} is {value:g}; {low:g} to {high:,.16g} is taken"
    return ""


def _field(name: str) -> str:
    """Returns the path of a figure, as AIP-193 has it for an entry of a map."""
    return f"metrics[{plain(name[:MAX_NAME_BYTES])}]"
