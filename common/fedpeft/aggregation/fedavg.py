"""FedAvg: x + eta Delta, Delta the mean of the changes weighted by examples (1602.05629, algorithm 1)."""

from __future__ import annotations

from fedpeft.aggregation import strategies
from fedpeft.aggregation.scaled_step import ScaledOptions, ScaledStep


class FedAvgOptions(ScaledOptions):
    """Options of FedAvg."""


@strategies.register("fedavg")
class FedAvg(ScaledStep):
    """The mean of the clients' adapters, weighted by examples."""

    Options = FedAvgOptions
    options: FedAvgOptions
