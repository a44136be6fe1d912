"""Tensors that a strategy folds together: the A and B of a LoRA layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.spec import ADAPTER, TensorRole, TensorSpec
from fedpeft.aggregation import Doubles, GroupStrategy
from fedpeft.rounds.folding.contributions import Contribution, blocks_of
from fedpeft.rounds.folding.updates import Updates


class Grouped:
    """Delta of the tensors of groups: computed when the first tensor of a group is folded, held until the last.

    Args:
        updates: The updates of the round; of a strategy that knows no groups, no tensor is in one.
        specs: The tensors of an adapter version.
        sent: Names of all that the round sends, in the order of the manifests.
        base: The version that the updates started from.
        block: Elements at once.
    """

    def __init__(
        self, updates: Updates, specs: Sequence[TensorSpec], sent: Sequence[str], base: Tensors, block: int
    ) -> None:
        self._updates = updates
        self._shapes = {spec.name: spec.shape for spec in specs}
        self._sent = sent
        self._base = base
        self._block = block
        tuned = {spec.name for spec in specs if spec.section == ADAPTER}
        derived = [spec.name for spec in specs if TensorRole.DERIVED in spec.roles]
        names = [name for name in sent if name in tuned] + derived
        groups = updates.strategy.groups(names) if isinstance(updates.strategy, GroupStrategy) else ()
        self._group = {name: group for group in groups for name in group}
        self._ready: dict[str, Doubles] = {}

    def blocks(self, name: str) -> Iterator[tuple[int, Doubles]] | None:
        """Yields (start, Delta, float64 [block]) of a tensor; None if it is in no group."""
        group = self._group.get(name)
        if group is None:
            return None
        if name not in self._ready:
            base = [self._base[each].astype(np.float64) for each in group]
            assert isinstance(self._updates.strategy, GroupStrategy)  # or there were no group
            deltas = self._updates.strategy.reduce(base, lambda: self._changes(group))
            self._ready.update({each: delta.reshape(-1) for each, delta in zip(group, deltas, strict=True)})
        delta = self._ready.pop(name)
        return ((start, delta[start : start + self._block]) for start in range(0, delta.size, self._block))

    def sources(self, name: str) -> list[int]:
        """Returns the places, in the manifests, of the tensors that a tensor's Delta is made of; none if of itself."""
        return [self._sent.index(each) for each in self._group.get(name, ()) if each in self._sent]

    def _changes(self, group: Sequence[str]) -> Iterator[tuple[float, list[Doubles]]]:
        group = [name for name in group if name in self._sent]
        for contribution, share in zip(self._updates.ordered, self._updates.shares(), strict=True):
            yield share, [self._whole(contribution, name) for name in group]
            if contribution.release is not None:
                contribution.release()

    def _whole(self, contribution: Contribution, name: str) -> Doubles:
        place = self._sent.index(name)
        shape = contribution.manifest.entries[place].shape
        values = np.empty(math.prod(shape))
        for start, piece in blocks_of(contribution, place, self._block):
            values[start : start + piece.size] = piece
        if shape == self._shapes[name]:
            return values.reshape(shape)
        whole = -self._base[name].astype(np.float64)  # beyond its rank a client holds zeros
        whole[tuple(slice(size) for size in shape)] = values.reshape(shape)
        return whole
