"""Common part of the strategies that differ in Delta alone: the step is x + eta Delta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from fedpeft.aggregation import Doubles, Options, Strategy


class ScaledOptions(Options):
    """Options of the strategies with this step."""

    server_learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """eta; with 1 the adapter moves by Delta: where that is the mean of the changes, to the mean of the clients'
    adapters."""


class ScaledStep(Strategy):
    """A step of Delta times a number; no state is kept."""

    Options = ScaledOptions
    options: ScaledOptions

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + self.options.server_learning_rate * delta, {}
