"""FedAvg: x + eta Delta, Delta the mean of the changes weighted by examples (1602.05629, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from fedpeft.aggregation import Doubles, Options, Strategy, strategies


class FedAvgOptions(Options):
    """Options of FedAvg."""

    server_learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """eta; 1 replaces the adapter by the mean of the clients' adapters."""


@strategies.register("fedavg")
class FedAvg(Strategy):
    """The mean of the clients' adapters, weighted by examples."""

    Options = FedAvgOptions
    options: FedAvgOptions

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + self.options.server_learning_rate * delta, {}
