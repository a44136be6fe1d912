"""The fold: the updates of a round, and the adapter before it, become the adapter after it.

    Delta = (w_1 delta_1 + w_2 delta_2 + ...) / divisor, clients in the order of their ids, in float64

or as the strategy reduces blocks of all clients, or groups of tensors (`fedpeft.aggregation`). With noise at the server
(`fedpeft.privacy.central`) its factors and its divisor stand in place of the strategy's.

Promises kept here. The same contributions give the same bits, in whatever order they came, however large the blocks
are, and in whatever threads the tensors are folded: one value's arithmetic is the same sequence of IEEE 754 operations
every time, up to the noise where there is some. Memory does not grow with clients: all updates are read side by side, a
block of each in turn, so what is held is a few blocks, and the result of one tensor, or of one group. Where a strategy
looks at a block of all clients, the block is the smaller, the more clients there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.spec import ADAPTER, Section, TensorRole, TensorSpec
from fedpeft.aggregation import BlockStrategy, Cohort, Doubles, GroupStrategy, Norms, Options, Strategy, UpdateFacts
from fedpeft.codecs import BLOCK_ELEMENTS
from fedpeft.codecs.sum128 import SUM128, ExactSum
from fedpeft.errors import Internal
from fedpeft.privacy.central import NoisedSum
from fedpeft.rounds.contributions import Contribution, Overflow, blocks_of, exact_sums

RESIDENT_BYTES = 8 * 1024 * 1024
"""Bytes read of mapped payloads, all together, before their pages are given back."""

FAULT_BYTES = 64 * 1024
"""Least memory that reading one byte of a mapped file makes resident; the system may map far more."""

SIDE_BY_SIDE_BYTES = 16 * 1024 * 1024
"""Most bytes of a block of all clients, for strategies that look at one."""

LARGEST = float(np.finfo(np.float32).max)

State = Mapping[str, Mapping[str, Doubles]]
"""Server state: by slot, then by tensor."""


@dataclass(frozen=True, slots=True)
class FoldedTensor:
    """One tensor of the next version: values (float32, the spec's shape) and state by slot (flat)."""

    spec: TensorSpec
    values: NDArray[np.float32]
    state: Mapping[str, Doubles]


@dataclass(frozen=True, slots=True)
class Folded:
    """The next version, whole; `weights` are by client, as the strategy gave them."""

    adapter: dict[str, NDArray[np.float32]]
    state: dict[str, dict[str, Doubles]]
    weights: dict[str, float]


def fold(
    contributions: Sequence[Contribution],
    specs: Sequence[TensorSpec],
    strategy: Strategy,
    base: Tensors,
    state: State,
) -> Folded:
    """Folds all tensors and holds them together; `fold_tensors` is the frugal way.

    Args and raises: as in `fold_tensors`.
    """
    adapter: dict[str, NDArray[np.float32]] = {}
    after: dict[str, dict[str, Doubles]] = {slot: {} for slot in strategy.slots}
    for folded in fold_tensors(contributions, specs, strategy, base, state):
        adapter[folded.spec.name] = folded.values
        for slot, values in folded.state.items():
            after[slot][folded.spec.name] = values
    return Folded(adapter, after, weigh(contributions, strategy))


def fold_tensors(
    contributions: Sequence[Contribution],
    specs: Sequence[TensorSpec],
    strategy: Strategy,
    base: Tensors,
    state: State,
    block: int = BLOCK_ELEMENTS,
    *,
    clips: bool = False,
    measured: Callable[[Mapping[str, float]], object] | None = None,
    noised: NoisedSum | None = None,
    exact: bool = False,
) -> Iterator[FoldedTensor]:
    """Yields the tensors of the next version in the order of `specs`.

    Tensors of another section than the adapter are folded by `SectionSum` and have no state.
    A tensor that the updates do not hold (its role in this round is frozen) is carried over with its
    state, unchanged; unless the strategy derives it.

    Args:
        contributions: The updates that count, checked, all with the same tensors, in any order; with LoRA factors of
            lower ranks where the strategy takes such.
        specs: The tensors of an adapter version.
        strategy: The aggregation strategy.
        base: The version that the updates started from.
        state: The server state of that version; what is missing is the strategy's initial one.
        block: Elements folded at once; the result does not depend on it.
        clips: True if a value beyond float32 becomes its largest, as rounds were folded before they were refused.
        measured: Called with the strategy's figures of the round, before the first tensor.
        noised: Rule of a sum with noise; the strategy must see one mean (`Strategy.sees_one_mean`), and `clips` be
            True, for leaving out an update would say something about it.
        exact: True if the updates are added up exactly (`fedpeft.codecs.sum128`), and may be sums of several; the
            strategy must see one mean.

    Raises:
        Overflow: If a value would be beyond float32; names the client whose update is the largest part of it.
        Internal: If there is no contribution, a client contributes twice, or the strategy's weights
            or results are not finite.
    """
    weights = weigh(contributions, strategy) if noised is None else noised.weights
    ordered = sorted(contributions, key=lambda c: c.client)
    sent = _sent(ordered)
    updates = {ADAPTER: _Updates(ordered, weights, strategy, block, noised, exact=exact)}
    for section in {spec.section for spec in specs} - {ADAPTER}:
        updates[section] = _Updates(ordered, dict.fromkeys(weights, 1.0), SectionSum(section), block)
    if noised is not None and not (strategy.sees_one_mean and clips and len(updates) == 1):
        raise Internal("noise was asked for where the updates do not enter by one sum alone")
    if exact and not (strategy.sees_one_mean and noised is None and len(updates) == 1):
        raise Internal("an exact sum was asked for where the updates do not enter by one sum alone")
    rule = strategy.of_round(_cohort(ordered, weights, strategy, specs, sent))
    if measured is not None:
        measured(rule.figures())
    grouped = _Grouped(updates[ADAPTER], specs, sent, base, block)
    for spec in specs:
        own = updates[spec.section]
        steps = rule if spec.section == ADAPTER else own.strategy
        before = {slot: _slot(steps, slot, spec, state) for slot in steps.slots}
        deltas = grouped.blocks(spec.name)
        if deltas is None and spec.name not in sent:
            yield FoldedTensor(spec, base[spec.name], before)
            continue
        try:
            deltas = deltas or own.deltas(sent.index(spec.name), spec.size)
            yield _step(deltas, spec, steps, base[spec.name], before, clips)
        except _Beyond as beyond:
            sources = grouped.sources(spec.name)
            found = own.loudest(sources) if sources else own.largest(sent.index(spec.name), beyond.position)
            raise Overflow(found[0], spec.name, found[1]) from None


def fold_sums(
    contributions: Sequence[Contribution], specs: Sequence[TensorSpec], strategy: Strategy
) -> Iterator[bytes]:
    """Yields the exact sum of the updates, each times its weight, block by block, as `sum128` writes it.

    Args:
        contributions: As in `fold_tensors`.
        specs: The tensors that the updates hold, in their order; all of the adapter.
        strategy: The aggregation strategy; it must see one mean.

    Raises:
        Overflow: If a sum is too large; names the client whose update is the largest part of it.
        Internal: As in `fold_tensors`.
    """
    weights = weigh(contributions, strategy)
    updates = _Updates(sorted(contributions, key=lambda c: c.client), weights, strategy, BLOCK_ELEMENTS)
    if [spec.name for spec in specs] != _sent(updates.ordered):
        raise Internal("the updates have other tensors than the round sends")
    for index, spec in enumerate(specs):
        for _, total in updates.exact_sums(index, spec.size):
            try:
                yield SUM128.write(*total.total())
            except OverflowError:
                client, value = updates.loudest([index])
                raise Overflow(client, spec.name, value, "the range of exact sums") from None


def _sent(ordered: Sequence[Contribution]) -> list[str]:
    """Returns the names of the tensors that the updates hold, in the order of the manifests.

    Raises:
        Internal: If they differ.
    """
    sent = [entry.name for entry in ordered[0].manifest.entries]
    for contribution in ordered:
        if [entry.name for entry in contribution.manifest.entries] != sent:
            raise Internal(f"the update of client {contribution.client} has other tensors than the first one's")
    return sent


def weigh(contributions: Sequence[Contribution], strategy: Strategy) -> dict[str, float]:
    """Returns the strategy's weight of each client, by id in order, not divided.

    Raises:
        Internal: If there is no contribution, a client contributes twice, or a weight is unusable.
    """
    weights = {c.client: strategy.weigh(c.facts) for c in contributions}
    if not weights or len(weights) != len(contributions):
        raise Internal(f"{len(contributions)} updates of {len(weights)} clients: want one each, and at least one")
    for client, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise Internal(f"the update of client {client} weighs {weight}, not a finite positive number")
    return dict(sorted(weights.items()))


def _cohort(
    ordered: Sequence[Contribution],
    weights: Mapping[str, float],
    strategy: Strategy,
    specs: Sequence[TensorSpec],
    sent: Sequence[str],
) -> Cohort:
    """Returns the cohort of a round; its norms are read in blocks of one size, on which the last bits depend."""
    adapter = [(sent.index(spec.name), spec.size) for spec in specs if spec.section == ADAPTER and spec.name in sent]
    return Cohort(
        [contribution.facts for contribution in ordered],
        lambda: _Updates(ordered, weights, strategy, BLOCK_ELEMENTS).norms(adapter),
    )


def _slot(strategy: Strategy, slot: str, spec: TensorSpec, state: State) -> Doubles:
    kept = state.get(slot, {}).get(spec.name)
    return strategy.initial(slot, spec.size) if kept is None else kept.reshape(-1)


def _step(
    means: Iterator[tuple[int, Doubles]],
    spec: TensorSpec,
    strategy: Strategy,
    base: NDArray[np.float32],
    before: Mapping[str, Doubles],
    clips: bool,
) -> FoldedTensor:
    x = base.reshape(-1)
    values = np.empty(spec.size, np.float32)
    after = {slot: np.empty_like(kept) for slot, kept in before.items()}
    for start, delta in means:
        here = slice(start, start + delta.size)
        old = {slot: _piece(kept, spec.size, here) for slot, kept in before.items()}
        stepped, state = strategy.step(x[here].astype(np.float64), delta, old)
        if not all(np.isfinite(a).all() for a in (stepped, *state.values())):
            raise Internal(f"the aggregation strategy made tensor {spec.name} not finite")
        beyond = np.abs(stepped) > LARGEST
        if beyond.any():
            if not clips:
                raise _Beyond(start + int(beyond.argmax()))
            stepped = np.clip(stepped, -LARGEST, LARGEST)
        values[here] = stepped
        for slot, kept in after.items():
            _piece(kept, spec.size, here)[:] = state[slot]
    return FoldedTensor(spec, values.reshape(spec.shape), after)


class _Beyond(Exception):
    """The value of a tensor at a position would be beyond float32."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


def _piece(kept: Doubles, size: int, here: slice) -> Doubles:
    """Returns the block of a slot, or all of one that the whole tensor shares."""
    return kept[here] if kept.size == size else kept


class SectionSum(Strategy):
    """The rule of another section than the adapter: x + the sum of the changes / the section's divisor."""

    def __init__(self, section: Section) -> None:
        super().__init__(Options())
        self._divisor = section.divisor or 1.0  # the spec was checked: it has one

    def divisor(self, cohort: Sequence[UpdateFacts], weights: Sequence[float]) -> float:
        """See `Strategy.divisor`."""
        return self._divisor

    def step(self, x: Doubles, delta: Doubles, state: Mapping[str, Doubles]) -> tuple[Doubles, dict[str, Doubles]]:
        """See `Strategy.step`."""
        return x + delta, {}


class _Updates:
    """The updates of a round, reduced to one Delta, a block at a time.

    Args:
        ordered: The contributions in client-id order, all with the same tensors.
        weights: By client.
        strategy: The aggregation strategy.
        block: Elements at once.
        noised: Rule of a sum with noise.
        exact: True if they are added up exactly.

    Raises:
        Internal: If the strategy's divisor is not finite and positive.
    """

    def __init__(
        self,
        ordered: Sequence[Contribution],
        weights: Mapping[str, float],
        strategy: Strategy,
        block: int,
        noised: NoisedSum | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.ordered = ordered
        self._exact = exact
        self._factors = [weights[contribution.client] for contribution in ordered]
        self._noised = noised
        self._divisor = strategy.divisor([contribution.facts for contribution in ordered], self._factors)
        if not (math.isfinite(self._divisor) and self._divisor > 0):
            raise Internal(f"the updates' sum is divided by {self._divisor}, not by a finite positive number")
        self.strategy = strategy
        self._block = block
        share = RESIDENT_BYTES // len(ordered)
        # Where even one fault of each is too much, every block is given back at once.
        self._limit = share if share >= FAULT_BYTES else 0
        self._read = [0] * len(ordered)
        self._whole, self._scaled = np.empty((2, block))

    def deltas(self, index: int, size: int) -> Iterator[tuple[int, Doubles]]:
        """Yields (start, Delta, float64 [block]) of the tensor at `index` of the manifests.

        The array is used again for the next block.
        """
        if isinstance(self.strategy, BlockStrategy):
            return self._reduced(self.strategy, index, size)
        if self._exact:
            sums = self.exact_sums(index, size)
            return ((start, total.quotient(self._divisor)) for start, total in sums)
        return self._sums(index, size)

    def exact_sums(self, index: int, size: int) -> Iterator[tuple[int, ExactSum]]:
        """Yields (start, the exact sum of a block) of the tensor at `index` of the manifests; not divided."""
        return exact_sums(self.ordered, self._factors, index, size, self._block, self._release)

    def shares(self) -> list[float]:
        """Returns each client's part of all weights, in client-id order."""
        total = math.fsum(self._factors)
        return [factor / total for factor in self._factors]

    def norms(self, tensors: Sequence[tuple[int, int]]) -> Norms:
        """Returns the norms over some tensors, each an index of the manifests and a size; of weighted sums."""
        squares, delta = np.zeros(len(self.ordered)), 0.0
        for index, size in tensors:
            for _, mean in self._sums(index, size, squares):
                delta += float(np.square(mean, out=mean).sum())
        parts = (
            float(square) * (factor / self._divisor) for square, factor in zip(squares, self._factors, strict=True)
        )
        return Norms(math.fsum(parts), delta)

    def _sums(self, index: int, size: int, squares: Doubles | None = None) -> Iterator[tuple[int, Doubles]]:
        """Yields blocks of the weighted sum; adds each client's squares, before they are weighted, to `squares`."""
        readers = [blocks_of(contribution, index, self._block) for contribution in self.ordered]
        for start in range(0, size, self._block):
            mean = self._whole[: min(self._block, size - start)]
            mean.fill(0)
            for place, (reader, factor) in enumerate(zip(readers, self._factors, strict=True)):
                _, values = next(reader)
                product = self._scaled[: values.size]
                np.copyto(product, values)
                if squares is not None:
                    squares[place] += np.square(product).sum()
                product *= factor
                mean += product
                self._release(place, values.nbytes)
            if self._noised is not None:
                self._noised.publish(mean)
            else:
                mean /= self._divisor
            yield start, mean

    def _reduced(self, strategy: BlockStrategy, index: int, size: int) -> Iterator[tuple[int, Doubles]]:
        block = max(1, min(self._block, SIDE_BY_SIDE_BYTES // (8 * len(self.ordered))))
        readers = [blocks_of(contribution, index, block) for contribution in self.ordered]
        weights = np.array(self._factors)
        for start in range(0, size, block):
            rows = np.empty((len(readers), min(block, size - start)))
            for place, (row, reader) in enumerate(zip(rows, readers, strict=True)):
                _, values = next(reader)
                row[:] = values
                self._release(place, values.nbytes)
            yield start, strategy.reduce(rows, weights)

    def largest(self, index: int, position: int) -> tuple[str, float]:
        """Returns the client whose weighted value at a place of a tensor is the largest, and the value."""
        found = ("", 0.0, -1.0)
        for contribution, factor in zip(self.ordered, self._factors, strict=True):
            for start, values in blocks_of(contribution, index, self._block):
                if start <= position < start + values.size:
                    value = float(values[position - start])
                    found = max(found, (contribution.client, value, abs(value) * factor), key=lambda each: each[2])
                    break
        return found[0], found[1]

    def loudest(self, indices: Sequence[int]) -> tuple[str, float]:
        """Returns the client whose weighted value somewhere in some tensors is the largest of all, and the value."""
        found = ("", 0.0, -1.0)
        for contribution, factor in zip(self.ordered, self._factors, strict=True):
            for index in indices:
                for _, values in blocks_of(contribution, index, self._block):
                    value = float(values[np.abs(values).argmax()])
                    found = max(found, (contribution.client, value, abs(value) * factor), key=lambda each: each[2])
        return found[0], found[1]

    def _release(self, place: int, size_bytes: int) -> None:
        self._read[place] += size_bytes
        release = self.ordered[place].release
        if release is not None and self._read[place] >= self._limit:
            self._read[place] = 0
            release()


class _Grouped:
    """Delta of the tensors of groups: computed when the first tensor of a group is folded, held until the last.

    Args:
        updates: The updates of the round; of a strategy that knows no groups, no tensor is in one.
        specs: The tensors of an adapter version.
        sent: Names of all that the round sends, in the order of the manifests.
        base: The version that the updates started from.
        block: Elements at once.
    """

    def __init__(
        self, updates: _Updates, specs: Sequence[TensorSpec], sent: Sequence[str], base: Tensors, block: int
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
