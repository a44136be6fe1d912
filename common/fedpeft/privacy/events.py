"""Events of committed rounds: frozen values that say what was done to the updates that were folded.

A round's record holds its events, so the events of a run's records are its ledger. An accountant is a fold over it: it
keeps no state of its own, and a run that was killed and resumed has the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Clipped:
    """Every folded update was within a bound.

    Attributes:
        bound: Largest Euclidean norm of an update, over all its tensors.
        count: Number of updates that were folded.
    """

    bound: float
    count: int
    kind: Literal["clipped"] = "clipped"


Event = Clipped
"""Any event; a further class makes this a union, told apart by `kind`."""
