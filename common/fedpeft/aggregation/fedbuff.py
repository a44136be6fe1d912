"""FedBuff: x + eta / K sum s(tau_i) Delta_i over the K updates of a buffer (2106.06639, algorithm 1).

    s(tau) = (1 + tau)^-a

tau is the staleness of an update, a = 0.5 in the paper. The sum is divided by K and not by the sum of the factors:
where all updates are equally stale, the step is still the smaller, the staler they are. Updates count alike, whatever
their examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fedpeft.aggregation import UpdateFacts, strategies
from fedpeft.aggregation.scaled_step import ScaledOptions, ScaledStep


class FedBuffOptions(ScaledOptions):
    """Options of FedBuff."""

    staleness_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    """a; 0 ignores staleness."""


@strategies.register("fedbuff")
class FedBuff(ScaledStep):
    """The sum of the changes, the staler the less, divided by their number."""

    Options = FedBuffOptions
    options: FedBuffOptions

    def weigh(self, facts: UpdateFacts) -> float:
        """See `Strategy.weigh`."""
        return float((1 + facts.staleness) ** -self.options.staleness_exponent)

    def divisor(self, cohort: Sequence[UpdateFacts], weights: Sequence[float]) -> float:
        """See `Strategy.divisor`; K."""
        return float(len(cohort))
