"""Screening: which updates of a closed round are folded, judged by their norms. Pure.

    reference = median of (the medians of the last 8 comparable rounds, and the norms of this round)
    allowance = sqrt(local steps / median of local steps), at least 1, at most 100
    limit     = factor x reference x allowance,  and never more than 1,000 x sqrt(values)

An update whose norm is above its limit is excluded. Rounds are comparable if the same tensors are sent in them. Norms
of zero say nothing and are left out of every median, and norms above the absolute limit out of this one; a median of an
even count is the upper of the two in the middle: what is too large never gets into the past, and what is tiny does.
With fewer than 3 numbers there is no reference, and only the absolute limit holds.

Local steps are those that the examples of an update make by the run's `[training]`, so with `epochs` a client that has
a thousand times the data may change more, and with `steps` all are equal. What was measured, and what it does not stop:
docs/benchmarks.md and docs/security.md.

The verdict depends on the set of updates that were received and on committed rounds alone, not on arrival order,
retries or restarts. So it is part of the record, and whoever holds the updates can reach it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import DEFAULT_EPOCHS, TrainingConfig

FACTOR = 30.0
"""Default of `aggregation.norm_factor`."""
LARGEST_RMS = 1000.0
"""Largest root mean square of an update's values, whatever others send: a change that no training makes."""
LARGEST_ALLOWANCE = 100.0
"""Largest allowance for local steps: that of 10,000 times the median's, which examples may claim and nobody proves."""
ROUNDS = 8
"""Committed rounds whose medians are looked at."""
LEAST = 3
"""Fewest numbers that a median is taken of."""
_LOOK_BACK = 64
"""Rounds among which comparable ones are looked for; the roles of tensors repeat after a few."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The extent of an update, or the medians of several.

    Attributes:
        norm: Euclidean norm of the decoded update; 0 if there is none.
        steps: Local optimiser steps that its examples make.
    """

    norm: float
    steps: float


@dataclass(frozen=True, slots=True)
class NormBound:
    """The limit of a round's norms, and what it was made of.

    Attributes:
        factor: `aggregation.norm_factor`.
        reference: The median of norms; 0 if there were too few numbers for one.
        steps: The median of local steps.
        limit: Largest norm that is folded of an update of so many steps, or of fewer.
        largest: Largest norm that is folded at all.
    """

    factor: float
    reference: float
    steps: float
    limit: float
    largest: float

    def allowance(self, steps: float) -> float:
        """Returns by how much the limit of an update of so many local steps is larger."""
        return min(math.sqrt(max(steps / self.steps, 1.0)), LARGEST_ALLOWANCE) if self.reference else 1.0

    def against(self, update: Extent) -> str:
        """Returns the sentence for an update above its limit; empty for one that is not."""
        allowance = self.allowance(update.steps)
        if update.norm <= min(self.limit * allowance, self.largest):
            return ""
        said = f"its norm {update.norm:.3g} is more than"
        if not self.reference or self.limit * allowance >= self.largest:
            return f"{said} {self.largest:.3g}, a change of {LARGEST_RMS:g} in every value"
        said += f" {self.factor * allowance:.3g} times {self.reference:.3g}, the median of this round and those before"
        return said if allowance == 1 else f"{said} ({self.factor:g} times, times {allowance:.3g} for its local steps)"


def local_steps(examples: int, training: TrainingConfig) -> float:
    """Returns the optimiser steps that a client makes with so many examples; a float, as records have it."""
    return float(training.steps or (training.epochs or DEFAULT_EPOCHS) * math.ceil(examples / training.batch_size))


def median(extents: Iterable[Extent]) -> Extent:
    """Returns the medians of those whose norm is not zero, of an even count the upper ones; zeros if there are none."""
    known = [extent for extent in extents if extent.norm > 0]
    if not known:
        return Extent(0.0, 0.0)
    norms, steps = (sorted(values) for values in zip(*((e.norm, e.steps) for e in known), strict=True))
    return Extent(norms[len(known) // 2], steps[len(known) // 2])


def bound(updates: Iterable[Extent], past: Sequence[Extent], values: int, factor: float) -> NormBound | None:
    """Returns the limit of a round's norms.

    Args:
        updates: Those received, in any order.
        past: Medians of the comparable rounds before, as `comparable` names them; norms of zero are ignored.
        values: Values in an update.
        factor: `aggregation.norm_factor`; 0 for no limit.

    Returns:
        The limit; None if there is none.
    """
    if factor == 0:
        return None
    largest = LARGEST_RMS * math.sqrt(values)
    known = [extent for extent in (*past, *(u for u in updates if u.norm <= largest)) if extent.norm > 0]
    middle = median(known) if len(known) >= LEAST else Extent(0.0, 0.0)
    limit = min(largest, factor * middle.norm) if middle.norm else largest
    return NormBound(factor, middle.norm, middle.steps, limit, largest)


def comparable(spec: AdapterSpec, number: int) -> list[int]:
    """Returns the rounds before round `number` whose medians are looked at: the nearest that send the same tensors."""
    sent = [tensor.name for tensor in spec.sent(number)]
    before = range(number - 1, max(number - 1 - _LOOK_BACK, 0), -1)
    same = (n for n in before if [tensor.name for tensor in spec.sent(n)] == sent)
    return [n for n, _ in zip(same, range(ROUNDS), strict=False)]
