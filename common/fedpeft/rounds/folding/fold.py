"""The fold: the updates of a round, and the adapter before it, become the adapter after it.

    Delta = (w_1 delta_1 + w_2 delta_2 + ...) / divisor, clients in the order of their ids, in float64

or as the strategy reduces blocks of all clients, or groups of tensors (`fedpeft.aggregation`). With noise at the server
(`fedpeft.privacy.central`) its factors and its divisor stand in place of the strategy's; with exact sums the order of
the clients makes no difference (`fedpeft.codecs.sum128`).

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
from fedpeft.adapters.spec import ADAPTER, TensorSpec
from fedpeft.aggregation import Cohort, Doubles, Strategy
from fedpeft.codecs import BLOCK_ELEMENTS
from fedpeft.codecs.sum128 import SUM128
from fedpeft.errors import Internal
from fedpeft.privacy.central import NoisedSum
from fedpeft.rounds.folding.contributions import Contribution, Overflow
from fedpeft.rounds.folding.grouped import Grouped
from fedpeft.rounds.folding.updates import SectionSum, Updates

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
    updates = {ADAPTER: Updates(ordered, weights, strategy, block, noised, exact=exact)}
    for section in {spec.section for spec in specs} - {ADAPTER}:
        updates[section] = Updates(ordered, dict.fromkeys(weights, 1.0), SectionSum(section), block)
    if noised is not None and not (strategy.sees_one_mean and clips and len(updates) == 1):
        raise Internal("noise was asked for where the updates do not enter by one sum alone")
    if exact and not (strategy.sees_one_mean and noised is None and len(updates) == 1):
        raise Internal("an exact sum was asked for where the updates do not enter by one sum alone")
    rule = strategy.of_round(_cohort(ordered, weights, strategy, specs, sent))
    if measured is not None:
        measured(rule.figures())
    grouped = Grouped(updates[ADAPTER], specs, sent, base, block)
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
    updates = Updates(sorted(contributions, key=lambda c: c.client), weights, strategy, BLOCK_ELEMENTS)
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
        lambda: Updates(ordered, weights, strategy, BLOCK_ELEMENTS).norms(adapter),
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
