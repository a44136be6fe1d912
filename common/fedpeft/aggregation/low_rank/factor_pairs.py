"""Pairs of LoRA factors among the tensors of a round, and the strategy that takes each pair together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.aggregation import Changes, Doubles, GroupStrategy
from fedpeft.aggregation.low_rank.stacked_factors import Stack
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of A [rank, in] and B [out, rank], as the `peft` library gives them."""


class FactorStrategy(GroupStrategy):
    """A strategy whose groups begin with A and B of a LoRA layer; other tensors get the weighted mean."""

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `Strategy.misfit`."""
        rounds = range(1, spec.period + 1)
        if all(self.groups([tensor.name for tensor in spec.adapter.sent(number)]) for number in rounds):
            return None
        needed = "A and B of a LoRA layer in every round, which updates"
        name = config.aggregation.strategy
        return "aggregation.strategy", f"is {name!r}, which needs {needed} of method {spec.method!r} do not have"

    def groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        """See `GroupStrategy.groups`; one (A, B) a layer."""
        pairs = ((name, name.removesuffix(DOWN) + UP) for name in names if name.endswith(DOWN))
        return [pair for pair in pairs if pair[1] in names]

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + delta, {}


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
