"""FedAdagrad: v + Delta^2, without momentum by default (2003.00295, algorithm 2)."""

from __future__ import annotations

from fedpeft.aggregation import Doubles, strategies
from fedpeft.aggregation.adaptive import Adaptive, AdaptiveOptions, Share


class FedAdagradOptions(AdaptiveOptions):
    """Options of FedAdagrad."""

    beta1: Share = 0.0
    """b1, the momentum of m; the paper's Adagrad has none."""


@strategies.register("fedadagrad")
class FedAdagrad(Adaptive):
    """Steps that shrink with all the change a value has seen."""

    Options = FedAdagradOptions
    options: FedAdagradOptions

    def second(self, v: Doubles, square: Doubles) -> Doubles:
        """See `Adaptive.second`."""
        return v + square
