"""Plain local training: the optimizer alone, as in FedAvg (1602.05629)."""

from __future__ import annotations

from fedpeft.algorithms import LocalAlgorithm, algorithms


@algorithms.register("plain")
class Plain(LocalAlgorithm):
    """Changes nothing."""
