"""FedNova: x + tau Delta, Delta the mean of the changes, each divided by its local steps (2007.07481).

    d_i = Delta_i / a_i,    tau = sum p_i a_i,    x + eta tau sum p_i d_i,    p_i by examples

a_i is the sum of the factors with which the gradients of client i's steps stand in its change, in learning rates. With
Nesterov momentum b, as clients train here, the gradient of step k of t stands in it with (1 - b^(t-k+2)) / (1 - b), so

    a = (t - b^2 (1 - b^t) / (1 - b)) / (1 - b);    without momentum a = t.

Clients that make more steps, because they have more data or epochs, no longer pull the adapter towards their optimum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft.aggregation import UpdateFacts, strategies
from fedpeft.aggregation.scaled_step import ScaledStep


def accumulated(steps: float, momentum: float) -> float:
    """Returns a: the change that a constant gradient of 1 makes in so many steps, in learning rates."""
    b = momentum
    return (steps - b * b * (1 - math.pow(b, steps)) / (1 - b)) / (1 - b)


@strategies.register("fednova")
class FedNova(ScaledStep):
    """The mean of the changes per local step, times the mean of the steps; with equal steps it is FedAvg."""

    normalises_by_steps = True

    def weigh(self, facts: UpdateFacts) -> float:
        """See `Strategy.weigh`."""
        return facts.examples / accumulated(facts.steps, facts.momentum)

    def divisor(self, cohort: Sequence[UpdateFacts], weights: Sequence[float]) -> float:
        """See `Strategy.divisor`; n / tau, n all examples."""
        examples = math.fsum(facts.examples for facts in cohort)
        tau = math.fsum(facts.examples * accumulated(facts.steps, facts.momentum) for facts in cohort) / examples
        return examples / tau
