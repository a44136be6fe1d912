"""FedExP: FedAvg with a longer step, the less the clients' changes agree (2301.09604, algorithm 1).

    eta = max(1, sum p_i ||Delta_i||^2 / (2 (||D||^2 + epsilon))),    x + eta D,    D = sum p_i Delta_i

The norms are over all tensors that the round sends, so one eta holds for all of them. Equal changes have eta = 1, n
orthogonal ones of one length n / 2. The paper weighs clients alike; here p_i are their parts of all examples, as in
FedAvg. Two things differ besides: eta has a largest value, for a client that sends the others' mean reversed makes D as
short as it likes; and what is served is x itself, where the paper reports the mean of the last two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from fedpeft.aggregation import Cohort, Doubles, Options, Strategy, strategies


class FedExpOptions(Options):
    """Options of FedExP."""

    epsilon: Annotated[float, Field(gt=0, le=1e6)] = 1e-3
    """Added to ||D||^2, which it should not exceed by much: with a far larger one this is FedAvg. The paper's code
    takes 0.001 and 0.1 for whole models."""
    largest_step: Annotated[float, Field(ge=1, le=100)] = 10.0
    """Largest eta; 20 clients whose changes are orthogonal come to it."""


@strategies.register("fedexp")
class FedExp(Strategy):
    """FedAvg by a server learning rate that each round's changes decide."""

    Options = FedExpOptions
    options: FedExpOptions
    needs_one_version = True
    _eta = 1.0

    def of_round(self, cohort: Cohort) -> Strategy:
        """See `Strategy.of_round`; it knows eta."""
        norms, rule = cohort.norms(), FedExp(self.options)
        eta = norms.changes / (2 * (norms.delta + self.options.epsilon))
        rule._eta = min(max(1.0, eta), self.options.largest_step)
        return rule

    def figures(self) -> dict[str, float]:
        """See `Strategy.figures`."""
        return {"server_learning_rate": self._eta}

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + self._eta * delta, {}
