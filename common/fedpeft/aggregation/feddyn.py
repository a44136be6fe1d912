"""FedDyn at the server: the mean of the clients, corrected by what they keep (2111.04263, algorithm 1).

    h <- h - (a / N) sum (y_i - x),    x <- mean y_i - h / a,    over the n updates of a round

N are all clients of the federation, sampled or not: h stays the mean of the lambda_i that they keep by the local
algorithm of the same name, which has a. Here h is kept divided by a, as lambda_i is there, so the server needs no a:

    h <- h - (n / N) D,    x <- x + D - h,    D = mean (y_i - x)

The mean is not weighted by examples, as in the paper: only so do h and D add up the same changes. Where clients differ
much in examples, the optimum is that of the mean of their mean losses. What is served is x, the paper's server model;
its code reports the mean of the clients' models beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import Cohort, Doubles, Options, Strategy, UpdateFacts, strategies
from fedpeft.config import PLAIN, RunConfig
from fedpeft.config_errors import Fault

FEDDYN = "feddyn"
"""Name of the strategy, and of the local algorithm that is its other half."""


class FedDynOptions(Options):
    """Options of FedDyn at the server."""

    population: Annotated[int, Field(ge=1, le=1_000_000)]
    """Clients of the whole federation (N), sampled or not."""


@strategies.register(FEDDYN)
class FedDyn(Strategy):
    """The mean of the clients' adapters, and minus h."""

    Options = FedDynOptions
    options: FedDynOptions
    slots = ("h",)
    needs_one_version = True
    _share = 1.0
    """n / N of the round; until it is known that of one in which all take part."""

    def weigh(self, facts: UpdateFacts) -> float:
        """See `Strategy.weigh`; all weigh the same."""
        return 1.0

    @property
    def population(self) -> int:
        """See `Strategy.population`."""
        return self.options.population

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `Strategy.misfit`."""
        chosen, clients = config.training.algorithm, config.rounds.clients
        name = chosen.name if chosen else PLAIN
        if name != FEDDYN:
            return "training.algorithm", f"is {name!r}; {FEDDYN!r} is needed, whose clients keep what h is the mean of"
        if self.options.population < clients:
            return (
                "aggregation.population",
                f"is {self.options.population}, fewer than the {clients} clients of a round",
            )
        return None

    def of_round(self, cohort: Cohort) -> Strategy:
        """See `Strategy.of_round`; it knows n."""
        rule = FedDyn(self.options)
        rule._share = len(cohort.facts) / self.options.population
        return rule

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        h = state["h"] - self._share * delta
        return x + delta - h, {"h": h}
