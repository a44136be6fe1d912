"""FedBuff: x + eta / K sum s(tau_i) Delta_i over the K updates of a buffer (2106.06639, algorithm 1).

    s(tau) = (1 + tau)^-a

tau is the staleness of an update, a = 0.5 in the paper. The sum is divided by K and not by the sum of the factors:
where all updates are equally stale, the step is still the smaller, the staler they are. Updates count alike, whatever
their examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from fedpeft.aggregation import Doubles, Options, Strategy, UpdateFacts, strategies


class FedBuffOptions(Options):
    """Options of FedBuff."""

    server_learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """eta."""
    staleness_exponent: Annotated[float, Field(ge=0, le=10)] = 0.5
    """a; 0 ignores staleness."""


@strategies.register("fedbuff")
class FedBuff(Strategy):
    """The sum of the changes, the staler the less, divided by their number."""

    Options = FedBuffOptions
    options: FedBuffOptions

    def weigh(self, facts: UpdateFacts) -> float:
        """See `Strategy.weigh`."""
        return float((1 + facts.staleness) ** -self.options.staleness_exponent)

    def divisor(self, cohort: Sequence[UpdateFacts], weights: Sequence[float]) -> float:
        """See `Strategy.divisor`; K."""
        return float(len(cohort))

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + self.options.server_learning_rate * delta, {}
