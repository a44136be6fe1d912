"""Pairs of LoRA factors among the tensors of a round, and the strategy that takes each pair together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import Changes, Doubles, GroupStrategy
from fedpeft.aggregation.low_rank.stacked_factors import Stack
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of A [rank, in] and B [out, rank], as the `peft` library gives them."""
RESIDUAL_DOWN, RESIDUAL_UP = ".residual.down", ".residual.up"
"""Ends of the names of V [residual rank, in] and U [out, residual rank] of method `lora_residual`."""


class FactorStrategy(GroupStrategy):
    """A strategy whose groups begin with A and B of a LoRA layer; other tensors get the weighted mean."""

    takes_ranks = True

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `Strategy.misfit`."""
        rounds = range(1, spec.period + 1)
        if all(_pairs([tensor.name for tensor in spec.adapter.sent(number)]) for number in rounds):
            return None
        needed = "A and B of a LoRA layer in every round, which updates"
        name = config.aggregation.strategy
        return "aggregation.strategy", f"is {name!r}, which needs {needed} of method {spec.method!r} do not have"

    def groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """See `GroupStrategy.groups`; one (A, B) a layer."""
        return list(_pairs(names))

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + delta, {}


class ResidualStrategy(FactorStrategy):
    """A strategy whose groups are A, B and the factors U, V of a layer's residual, which it derives."""

    derives = True

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `Strategy.misfit`."""
        if fault := super().misfit(config, spec):
            return fault
        if spec.derived:
            return None
        name = config.aggregation.strategy
        text = f"is {name!r}, which needs a residual that the server derives; method {spec.method!r} has none"
        return "aggregation.strategy", f"{text}, 'lora_residual' has"

    def groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """See `GroupStrategy.groups`; (A, B, V, U) a layer."""
        known, ends = set(names), ((a, b, a.removesuffix(DOWN)) for a, b in _pairs(names))
        groups = ((a, b, layer + RESIDUAL_DOWN, layer + RESIDUAL_UP) for a, b, layer in ends)
        return [group for group in groups if known.issuperset(group)]

    @staticmethod
    def added(base: Sequence[Doubles], more: Stack) -> list[Doubles]:
        """Returns the changes of V and U with which the residual becomes the nearest of its rank to itself and `more`.

        Args:
            base: A, B, V and U.
            more: The matrix to be added.
        """
        v, u = base[2:]
        whole = Stack(u.T, v).plus(more).shortened()
        if len(whole.up) > len(v):
            whole = whole.of_rank(len(v))
        kept = len(whole.up)
        after_v, after_u = np.zeros_like(v), np.zeros_like(u)
        after_v[:kept], after_u[:, :kept] = whole.down, whole.up.T
        return [after_v - v, after_u - u]


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the names of A and B of each layer of which there are both."""
    known = set(names)
    pairs = ((name, name.removesuffix(DOWN) + UP) for name in names if name.endswith(DOWN))
    return [pair for pair in pairs if pair[1] in known]


def products(base: Sequence[Doubles], changes: Changes) -> Stack:
    """Returns sum p_i B_i A_i of a layer, without its scale.

    Args:
        base: A and B, from which the clients started.
        changes: The clients' changes of both.
    """

    def each() -> Iterator[tuple[float, Doubles, Doubles]]:
        for share, (change_a, change_b) in changes():
            yield share, base[1] + change_b, base[0] + change_a

    return Stack.of(each(), len(base[1]), base[0].shape[1])
