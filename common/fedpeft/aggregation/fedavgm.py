"""FedAvgM: FedAvg with server momentum, u = b u + Delta, x + eta u (1909.06335, section 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from fedpeft.aggregation import Doubles, Options, Strategy, strategies


class FedAvgMOptions(Options):
    """Options of FedAvgM."""

    server_learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """eta; a constant Delta ends in steps of eta Delta / (1 - momentum)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """b; 0 is FedAvg."""


@strategies.register("fedavgm")
class FedAvgM(Strategy):
    """FedAvg with momentum kept at the server."""

    Options = FedAvgMOptions
    options: FedAvgMOptions
    slots = ("momentum",)

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        u = self.options.momentum * state["momentum"] + delta
        return x + self.options.server_learning_rate * u, {"momentum": u}
