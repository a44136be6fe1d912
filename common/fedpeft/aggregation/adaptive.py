"""Common part of FedAdagrad, FedAdam and FedYogi: algorithm 2 of "Adaptive Federated Optimization" (2003.00295).

    m = b1 m + (1 - b1) Delta,  v by the strategy,  x + eta m / (sqrt(v) + tau),  v before the first step tau^2

Without bias correction, as in the paper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from fedpeft.aggregation import Doubles, Options, Strategy

Share = Annotated[float, Field(ge=0, lt=1)]


class AdaptiveOptions(Options):
    """Options of the adaptive strategies."""

    server_learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.01
    """eta; about how far a value moves in a round."""
    beta1: Share = 0.9
    """b1, the momentum of m."""
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Degree of adaptivity: a large tau makes steps proportional to Delta."""


class DecayOptions(AdaptiveOptions):
    """Options of the strategies whose v forgets."""

    beta2: Share = 0.99
    """b2, the momentum of v."""


class Adaptive(Strategy):
    """A step in each value's own measure; m and v are kept for each value."""

    Options = AdaptiveOptions
    options: AdaptiveOptions
    slots: ClassVar[tuple[str, ...]] = ("m", "v")

    @abstractmethod
    def second(self, v: Doubles, square: Doubles) -> Doubles:
        """Returns the next v, float64 [block], from the last and Delta squared."""

    def initial(self, slot: str, size: int) -> Doubles:
        """See `Strategy.initial`."""
        return np.full(size, self.options.tau**2) if slot == "v" else super().initial(slot, size)

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        m, v = self.moments(delta, state)
        return self.move(x, m, v), {"m": m, "v": v}

    def moments(self, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, Doubles]:
        """Returns the next m and v, float64 [block]."""
        b1 = self.options.beta1
        m = b1 * state["m"] + (1 - b1) * delta
        return m, self.second(state["v"], np.square(delta))

    def move(self, x: Doubles, m: Doubles, v: Doubles) -> Doubles:
        """Returns x + eta m / (sqrt(v) + tau), float64 [block]."""
        return x + self.options.server_learning_rate * m / (np.sqrt(v) + self.options.tau)
