"""The updates of a round, read side by side, a block of each in turn, and reduced to one Delta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedpeft.adapters.spec import Section
from fedpeft.aggregation import BlockStrategy, Doubles, Norms, Options, Strategy, UpdateFacts
from fedpeft.codecs.sum128 import ExactSum
from fedpeft.errors import Internal
from fedpeft.privacy.central import NoisedSum
from fedpeft.rounds.folding.contributions import Contribution, blocks_of, exact_sums, is_sum

RESIDENT_BYTES = 8 * 1024 * 1024
"""Bytes read of mapped payloads, all together, before their pages are given back."""

FAULT_BYTES = 64 * 1024
"""Least memory that reading one byte of a mapped file makes resident; the system may map far more."""

SIDE_BY_SIDE_BYTES = 16 * 1024 * 1024
"""Most bytes of a block of all clients, for strategies that look at one."""


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


class Updates:
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

    def _weights(self) -> list[float]:
        """Returns by what the values of each update are multiplied: those of a sum have their weights already."""
        return [1.0 if is_sum(each.manifest) else by for each, by in zip(self.ordered, self._factors, strict=True)]

    def largest(self, index: int, position: int) -> tuple[str, float]:
        """Returns the client whose weighted value at a place of a tensor is the largest, and the value."""
        found = ("", 0.0, -1.0)
        for contribution, factor in zip(self.ordered, self._weights(), strict=True):
            for start, values in blocks_of(contribution, index, self._block):
                if start <= position < start + values.size:
                    value = float(values[position - start])
                    found = max(found, (contribution.client, value, abs(value) * factor), key=lambda each: each[2])
                    break
        return found[0], found[1]

    def loudest(self, indices: Sequence[int]) -> tuple[str, float]:
        """Returns the client whose weighted value somewhere in some tensors is the largest of all, and the value."""
        found = ("", 0.0, -1.0)
        for contribution, factor in zip(self.ordered, self._weights(), strict=True):
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
