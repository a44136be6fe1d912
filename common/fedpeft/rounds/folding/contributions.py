"""Contributions: the checked updates of a round as a fold reads them, a block of a tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedpeft.adapters.payload import Entry, Manifest
from fedpeft.adapters.spec import TensorSpec
from fedpeft.aggregation import UpdateFacts
from fedpeft.codecs import Values, codecs
from fedpeft.codecs.sum128 import MOST_ADDED, SUM128, ExactSum, High, Low, TooLarge
from fedpeft.errors import Internal


class Overflow(Exception):
    """A value of the result would be beyond float32, or an exact sum beyond its range.

    Attributes:
        client: The one whose update is the largest part of it.
    """

    def __init__(self, client: str, tensor: str, value: float, bounds: str = "the range of float32") -> None:
        super().__init__(f"with its value {value:.3g} tensor {tensor} would leave {bounds}")
        self.client = client


@dataclass(frozen=True, slots=True)
class Contribution:
    """One client's update, checked.

    Attributes:
        client: The client's id.
        facts: Facts that decide its weight.
        manifest: Description of the payload.
        payload: The payload's bytes, best a mapped file.
        release: Called now and then to give back pages that were read, so that resident memory stays flat; for a
            mapped file `fedpeft.process.mapped_files.releaser(payload)`.
    """

    client: str
    facts: UpdateFacts
    manifest: Manifest
    payload: memoryview
    release: Callable[[], object] | None = None


def blocks_of(contribution: Contribution, index: int, block: int) -> Iterator[tuple[int, Values]]:
    """Yields (start, values, float32 [block, the last one less]) of the tensor at `index` of a manifest."""
    entry = contribution.manifest.entries[index]
    data = contribution.payload[entry.offset : entry.offset + entry.length]
    return codecs.get(entry.encoding).blocks(data, math.prod(entry.shape), block)


def exact_sums(
    ordered: Sequence[Contribution],
    factors: Sequence[float],
    index: int,
    size: int,
    block: int,
    read: Callable[[int, int], object],
) -> Iterator[tuple[int, ExactSum]]:
    """Yields (start, the exact sum of a block) of the tensor at `index` of the manifests.

    An update that is a sum of several holds their values times their weights already.

    Args:
        ordered: The contributions, in any order.
        factors: The weight of each.
        index: Position of the tensor in the manifests.
        size: Values of the tensor.
        block: Values at once.
        read: Told the place of a contribution and the bytes that were read of it.

    Raises:
        Overflow: If a weighted value of a client is too large.
        Internal: If there are more contributions than an exact sum can have.
    """
    if len(ordered) > MOST_ADDED:
        raise Internal(f"there are {len(ordered):,} updates; an exact sum is of {MOST_ADDED:,} at most")
    readers = [_addends(contribution, index, block) for contribution in ordered]
    for start in range(0, size, block):
        total = ExactSum(min(block, size - start))
        for place, (reader, factor) in enumerate(zip(readers, factors, strict=True)):
            addend = next(reader)
            if isinstance(addend, tuple):
                total.add_sum(*addend)
                read(place, sum(part.nbytes for part in addend))
                continue
            try:
                total.add(addend, factor)
            except TooLarge as error:
                entry, value = ordered[place].manifest.entries[index], float(addend[error.position])
                raise Overflow(ordered[place].client, entry.name, value, "the range of exact sums") from None
            read(place, addend.nbytes)
        yield start, total


def _addends(contribution: Contribution, index: int, block: int) -> Iterator[Values | tuple[High, Low]]:
    entry = contribution.manifest.entries[index]
    if not codecs.get(entry.encoding).is_sum:
        return (values for _, values in blocks_of(contribution, index, block))
    data = contribution.payload[entry.offset : entry.offset + entry.length]
    return ((high, low) for _, high, low in SUM128.sums(data, math.prod(entry.shape), block))


def is_sum(manifest: Manifest) -> bool:
    """Returns True if a payload holds the sum of several updates, each times its weight."""
    return any(codecs.get(entry.encoding).is_sum for entry in manifest.entries)


def sum_manifest(specs: Sequence[TensorSpec], sha256: bytes) -> Manifest:
    """Returns the manifest of a sum of updates that hold these tensors; `sha256` is its payload's."""
    entries, offset = [], 0
    for spec in specs:
        length, _ = SUM128.length_bounds(spec.size)
        entries.append(Entry(spec.name, spec.shape, SUM128.name, offset, length))
        offset += length
    return Manifest(tuple(entries), offset, sha256)
