"""Screening: which updates of a closed round are folded, judged by their norms. Pure.

    reference = median of (the medians of the last 8 comparable rounds, and the norms of this round)
    limit     = factor x reference,  and never more than 1,000 x sqrt(values)

An update whose norm is above the limit is excluded. Rounds are comparable if the same tensors are sent in them. Norms
of zero say nothing and are left out of every median, and norms above the absolute limit out of this one; a median of an
even count is the upper of the two in the middle: what is too large never gets into the past, and what is tiny does.
With fewer than 3 numbers there is no reference, and only the absolute limit holds.

The verdict depends on the set of updates that were received and on committed rounds alone, not on arrival order,
retries or restarts. So it is part of the record, and whoever holds the updates can reach it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedpeft.spec import AdapterSpec

FACTOR = 30.0
"""Default of `aggregation.norm_factor`."""
LARGEST_RMS = 1000.0
"""Largest root mean square of an update's values, whatever others send: a change that no training makes."""
ROUNDS = 8
"""Committed rounds whose medians are looked at."""
LEAST = 3
"""Fewest numbers that a median is taken of."""
_LOOK_BACK = 64
"""Rounds among which comparable ones are looked for; the roles of tensors repeat after a few."""


@dataclass(frozen=True, slots=True)
class NormBound:
    """The limit of a round's norms, and what it was made of.

    Attributes:
        factor: `aggregation.norm_factor`.
        reference: The median; 0 if there were too few numbers for one.
        limit: Largest norm that is folded.
    """

    factor: float
    reference: float
    limit: float

    def against(self, norm: float) -> str:
        """Returns the sentence for a norm above the limit; empty for one that is not."""
        if norm <= self.limit:
            return ""
        if self.reference and self.limit == self.factor * self.reference:
            return (
                f"its norm {norm:.3g} is more than {self.factor:g} times {self.reference:.3g}, "
                "the median of this round and those before"
            )
        return f"its norm {norm:.3g} is more than {self.limit:.3g}, a change of {LARGEST_RMS:g} in every value"


def median(norms: Iterable[float]) -> float:
    """Returns the median of the norms that are not zero, of an even count the upper one; 0 if there are none."""
    ordered = sorted(norm for norm in norms if norm > 0)
    return ordered[len(ordered) // 2] if ordered else 0.0


def bound(norms: Iterable[float], past: Sequence[float], values: int, factor: float) -> NormBound | None:
    """Returns the limit of a round's norms.

    Args:
        norms: Of the updates received, in any order.
        past: Medians of the comparable rounds before, as `comparable` names them; zeros are ignored.
        values: Values in an update.
        factor: `aggregation.norm_factor`; 0 for no limit.

    Returns:
        The limit; None if there is none.
    """
    if factor == 0:
        return None
    largest = LARGEST_RMS * math.sqrt(values)
    known = [norm for norm in (*past, *(n for n in norms if n <= largest)) if norm > 0]
    reference = median(known) if len(known) >= LEAST else 0.0
    return NormBound(factor, reference, min(largest, factor * reference) if reference else largest)


def comparable(spec: AdapterSpec, number: int) -> list[int]:
    """Returns the rounds before round `number` whose medians are looked at: the nearest that send the same tensors."""
    sent = [tensor.name for tensor in spec.sent(number)]
    before = range(number - 1, max(number - 1 - _LOOK_BACK, 0), -1)
    same = (n for n in before if [tensor.name for tensor in spec.sent(n)] == sent)
    return [n for n, _ in zip(same, range(ROUNDS), strict=False)]
