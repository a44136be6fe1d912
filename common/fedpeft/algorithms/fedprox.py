"""FedProx (1812.06127): a pull towards the received values, which keeps clients from drifting apart.

The client minimises f_i(w) + mu / 2 ||w - w_t||^2, where w_t are the received tensors: mu (w - w_t) is added to the
gradient. In the space of LoRA the pull is on the factors, not on their product.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import strategies
from fedpeft.algorithms import AlgorithmOptions, LocalAlgorithm, RoundStart, algorithms
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault


class FedProxOptions(AlgorithmOptions):
    """Options of FedProx."""

    mu: Annotated[float, Field(ge=0, le=1000)] = 0.01
    """Strength of the pull; the paper takes 0.001 to 1."""


@algorithms.register("fedprox")
class FedProx(LocalAlgorithm):
    """Adds the gradient of the proximal term."""

    Options = FedProxOptions
    options: FedProxOptions

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `LocalAlgorithm.misfit`."""
        name = config.aggregation.strategy
        if not strategies.get(name).normalises_by_steps:
            return None
        return "aggregation.strategy", f"is {name!r}, which normalises by steps that no proximal term shortens"

    def start(self, start: RoundStart) -> None:
        """See `LocalAlgorithm.start`."""
        self._parameters = start.parameters
        self._received = {name: p.detach().clone() for name, p in start.parameters.items()}

    def after_gradient(self) -> None:
        """See `LocalAlgorithm.after_gradient`."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:  # without a gradient it has not moved, and nothing pulls
                parameter.grad.add_(parameter.detach() - self._received[name], alpha=self.options.mu)
