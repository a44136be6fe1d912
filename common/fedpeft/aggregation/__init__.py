"""Aggregation strategies: how updates become the next adapter version. One file a strategy; NumPy only.

The fold (`fedpeft.rounds.fold`) computes the weighted mean of the updates in client-id order, in float64;
a strategy says how much each update weighs and what the mean does to the adapter. The step is
elementwise, so a block at a time is enough and memory does not grow with clients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fedpeft.registry import Registry

Doubles = NDArray[np.float64]


class Options(BaseModel):
    """Options of a strategy, written beside `strategy` in the run file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Options: TypeAlias = Options  # inside Strategy, `Options` is the class variable


class Strategy(ABC):
    """One rule for the step from version r - 1 to version r.

    Delta is the weighted mean of the clients' changes, a pseudo-gradient with plus sign: x + Delta improves.
    """

    Options: ClassVar[type[_Options]] = Options
    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the server state kept for each tensor (float64), versioned with the adapter."""

    def __init__(self, options: _Options) -> None:
        self.options = options

    def weight(self, examples: int) -> float:
        """Returns the unnormalised weight of an update trained on `examples` examples."""
        return float(examples)

    def initial(self, slot: str, size: int) -> Doubles:
        """Returns the state of `slot` before a tensor's first step.

        Float64 [size], one value for each of the tensor's; or [1] for what the whole tensor shares,
        such as a count of steps.
        """
        return np.zeros(size)

    @abstractmethod
    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """Returns the next values and state of one block of a tensor; must not change its arguments.

        Args:
            x: Values now, float64 [block].
            delta: Weighted mean of the changes, float64 [block].
            state: By slot, float64 [block], or [1] for what the tensor shares: that is the same for
                each of its blocks, and so must be what is returned for it.
        """


strategies: Registry[type[Strategy]] = Registry("fedpeft.aggregation", "aggregation strategy")


def strategy(name: str, options: Mapping[str, object]) -> Strategy:
    """Builds a strategy from its name and options.

    Raises:
        ConfigInvalid: If there is no such strategy.
        pydantic.ValidationError: If an option is unknown or out of range.
    """
    cls = strategies.get(name)
    return cls(cls.Options.model_validate(dict(options)))
