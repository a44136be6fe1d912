"""Aggregation strategies: how updates become the next adapter version. One file a strategy; NumPy only.

A strategy weighs the updates, reduces them to one Delta, and steps from version r - 1 to version r. There are three
kinds, by what `reduce` sees:

    Strategy        nothing: Delta is the weighted mean, read client by client, whose memory does not grow with clients
    BlockStrategy   the values of all clients side by side, a block of a tensor at a time: robust rules
    GroupStrategy   whole tensors that belong together, client by client: the A and B of a LoRA layer

A step sees a block of one tensor. A strategy whose steps depend on the round as a whole (the number of its updates,
norms over all tensors) returns one that knows it from `of_round`.

All arithmetic is float64 in the order of client ids (`fedpeft.rounds.folding.fold`); with `exact_sum` the sum of the
updates is in fixed point, in any order (`fedpeft.codecs.sum128`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault
from fedpeft.registry import Registry

Doubles = NDArray[np.float64]


class Options(BaseModel):
    """Options of a strategy, written beside `strategy` in the run file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_Options: TypeAlias = Options  # inside Strategy, `Options` is the class variable


@dataclass(frozen=True, slots=True)
class UpdateFacts:
    """Facts about an update, from which a strategy makes its weight.

    Attributes:
        examples: Examples it was trained on, at least 1.
        steps: Local optimiser steps that those examples make by the run's `[training]`, at least 1.
        momentum: Momentum of the local SGD; 0 for other optimisers.
        staleness: Versions made since the one that it starts from; 0 in synchronous rounds.
    """

    examples: int
    steps: float = 1.0
    momentum: float = 0.0
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Norms:
    """Squared Euclidean norms over all tensors of the adapter that a round sends, together.

    Attributes:
        changes: sum p_i ||Delta_i||^2, p_i being the part that a client's change has in Delta: weight / divisor.
        delta: ||Delta||^2 = ||sum p_i Delta_i||^2.
    """

    changes: float
    delta: float


@dataclass(frozen=True, slots=True)
class Cohort:
    """The updates of a round that are folded, which a strategy may look at before the first tensor is stepped.

    Attributes:
        facts: Facts about each, in the order of client ids.
        norms: Reads all changes once more, a block of each at a time, and returns their norms. It takes as long as
            adding them up, so only a strategy that needs the norms calls it.
    """

    facts: Sequence[UpdateFacts]
    norms: Callable[[], Norms]


class Strategy(ABC):
    """One rule for the step from version r - 1 to version r.

    Delta is the weighted mean of the clients' changes, a pseudo-gradient with plus sign: x + Delta improves.
    """

    Options: ClassVar[type[_Options]] = Options
    slots: ClassVar[tuple[str, ...]] = ()
    """Names of the server state kept for each tensor (float64), versioned with the adapter."""
    normalises_by_steps: ClassVar[bool] = False
    """True if a change counts by the optimizer steps behind it: nothing else may shorten those."""
    needs_one_version: ClassVar[bool] = False
    """True if the updates of a round must all start from the same version."""
    takes_ranks: ClassVar[bool] = False
    """True if clients may have LoRA factors of a lower rank than the run's (`fedpeft.aggregation.low_rank.ranks`)."""
    derives: ClassVar[bool] = False
    """True if the strategy makes the tensors whose role is derived; others would leave them as they are for ever."""

    def __init__(self, options: _Options) -> None:
        self.options = options

    def weigh(self, facts: UpdateFacts) -> float:
        """Returns the weight of an update: the factor of its values in the sum, finite and positive."""
        return float(facts.examples)

    def divisor(self, cohort: Sequence[UpdateFacts], weights: Sequence[float]) -> float:
        """Returns by what the weighted sum of the round's updates is divided; their total weight makes it a mean."""
        return math.fsum(weights)

    @property
    def is_weighted_mean(self) -> bool:
        """True if Delta is the weighted mean of the changes, and not another sum or anything else."""
        return type(self).divisor is Strategy.divisor

    @property
    def sees_one_mean(self) -> bool:
        """True if the updates of a round enter by their mean alone, weighted by examples: any other mean would do."""
        own = type(self)
        return self.is_weighted_mean and own.weigh is Strategy.weigh and own.of_round is Strategy.of_round

    @property
    def population(self) -> int | None:
        """Clients of the whole federation, sampled or not, as its formula has them; None if it has no such number."""
        return None

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """Returns a field of a run with which the strategy cannot work, and why; None if there is none."""
        return None

    @property
    def shared_slots(self) -> frozenset[str]:
        """The slots of which a tensor has one value, and not one for each of its own."""
        return frozenset(slot for slot in self.slots if self.initial(slot, 2).size == 1)

    def initial(self, slot: str, size: int) -> Doubles:
        """Returns the state of `slot` before a tensor's first step.

        Float64 [size], one value for each of the tensor's; or [1] for what the whole tensor shares,
        such as a count of steps.
        """
        return np.zeros(size)

    def of_round(self, cohort: Cohort) -> Strategy:
        """Returns the strategy that makes the steps of a round; this one, where no step depends on the whole round.

        Another one has the same slots, and no say any more in weights and Delta.
        """
        return self

    def figures(self) -> dict[str, float]:
        """Returns finite figures of the round that this strategy steps; they stand among the metrics of the round."""
        return {}

    @abstractmethod
    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """Returns the next values and state of one block of a tensor; must not change its arguments.

        Args:
            x: Values now, float64 [block].
            delta: Delta of the round, as `reduce` or the weighted mean gives it, noise included, float64 [block].
            state: By slot, float64 [block], or [1] for what the tensor shares: that is the same for
                each of its blocks, and so must be what is returned for it.
        """


class BlockStrategy(Strategy):
    """A strategy whose Delta is not a weighted sum: each value of it is made of that value of all clients."""

    @property
    def is_weighted_mean(self) -> bool:
        """See `Strategy.is_weighted_mean`."""
        return False

    @abstractmethod
    def reduce(self, block: Doubles, weights: Doubles) -> Doubles:
        """Returns Delta, float64 [block]; must not change its arguments.

        Args:
            block: The changes, float64 [clients, block], in the order of client ids.
            weights: As `weigh` gave them, float64 [clients].
        """


Changes: TypeAlias = Callable[[], Iterator[tuple[float, list[Doubles]]]]
"""Reads the updates once more, in the order of client ids: each one's share (they sum to 1), and its changes of the
tensors of a group that are sent, float64 in their shapes."""


class GroupStrategy(Strategy):
    """A strategy whose Delta of some tensors depends on whole tensors that belong together."""

    needs_one_version = True

    @property
    def is_weighted_mean(self) -> bool:
        """See `Strategy.is_weighted_mean`."""
        return False

    @abstractmethod
    def groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """Returns the groups among the tensors that a round sends or derives.

        Every other tensor that is sent gets the weighted mean. In a group, those that are sent stand first.
        """

    @abstractmethod
    def reduce(self, base: Sequence[Doubles], changes: Changes) -> list[Doubles]:
        """Returns Delta of each tensor of a group, float64 in its shape.

        A change that an update has not, beyond its client's rank, is the one to zero: minus the value now.

        Args:
            base: Values of the tensors now, float64.
            changes: Reads the clients' changes; as often as is needed, one client at a time.
        """


strategies: Registry[type[Strategy]] = Registry("fedpeft.aggregation", "fedpeft.strategies", "aggregation strategy")


def strategy(name: str, options: Mapping[str, object]) -> Strategy:
    """Builds a strategy from its name and options.

    Raises:
        ConfigInvalid: If there is no such strategy.
        pydantic.ValidationError: If an option is unknown or out of range.
    """
    cls = strategies.get(name)
    return cls(cls.Options.model_validate(dict(options)))
