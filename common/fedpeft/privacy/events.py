"""Events of committed rounds: frozen values that say what was done to the updates that were folded.

A round's record holds its events, so the events of a run's records are its ledger. An accountant is a fold over it: it
keeps no state of its own, and a run that was killed and resumed has the same budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field


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


@dataclass(frozen=True, slots=True)
class Noised:
    """The sum of the folded updates was published with Gaussian noise, and with nothing else of them.

    Attributes:
        bound: Largest Euclidean norm of what an update adds to the sum.
        noise_multiplier: z of the Gaussian mechanism that the round is as private as. Where the bound adapts, the noise
            of sum and count together: the sum alone has a little more.
        divisor: Number that the sum was divided by, the same for any set of clients.
        count: Number of updates that were folded.
    """

    bound: float
    noise_multiplier: float
    divisor: int
    count: int
    kind: Literal["noised"] = "noised"


@dataclass(frozen=True, slots=True)
class Adapted:
    """The bound of the next round was made of a noised count, whose privacy the event beside it includes.

    Attributes:
        bound: The bound of the next round.
        unclipped: Noised share of the updates that were within the bound of this one; may be below 0 or above 1.
        count: Number of updates that were folded.
    """

    bound: float
    unclipped: float
    count: int
    kind: Literal["adapted"] = "adapted"


@dataclass(frozen=True, slots=True)
class LocallyNoised:
    """Every folded update had Gaussian noise of its client's, after its client had clipped it.

    Attributes:
        bound: Largest Euclidean norm of an update without its noise.
        noise_multiplier: Standard deviation of the noise, in bounds.
        count: Number of updates that were folded.
    """

    bound: float
    noise_multiplier: float
    count: int
    kind: Literal["locally_noised"] = "locally_noised"


@dataclass(frozen=True, slots=True)
class StepsNoised:
    """Every folded update came of training with noise in each step, by its client's word.

    What a client has spent is in its own ledger: it counts what was trained, which no server sees all of.

    Attributes:
        bound: Largest Euclidean norm of what an example adds to the sum of a step.
        noise_multiplier: Standard deviation of the noise, in bounds; None where each client works out its own.
        count: Number of updates that were folded.
    """

    bound: float
    noise_multiplier: float | None
    count: int
    kind: Literal["steps_noised"] = "steps_noised"


Event = Annotated[Clipped | Noised | Adapted | LocallyNoised | StepsNoised, Field(discriminator="kind")]
"""Any event, told apart by `kind`."""
