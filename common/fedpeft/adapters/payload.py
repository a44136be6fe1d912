"""Payloads: the bytes of tensors in the spec's order, and the manifest that describes them."""

from __future__ import annotations

import hashlib
import io
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fedpeft import seeds
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.codecs import BLOCK_ELEMENTS, codecs
from fedpeft.errors import ManifestInvalid, PayloadInvalid

CHUNK_BYTES = 1024 * 1024
"""Largest chunk on the wire."""

FIRST_CHUNK_BYTES = 64 * 1024
"""The first chunk of a transfer."""
LEAST_CHUNK_BYTES = 8 * 1024
"""The smallest, but for the last."""
FAST_S = 2.0
"""A chunk that leaves in less is followed by one twice as large,"""
SLOW_S = 15.0
"""one that takes longer by one half as large: no chunk comes near the time for which a transfer may stand still."""

RESIDENT_BYTES = 4 * 1024 * 1024
"""Bytes of a mapped payload that are read before they are given back."""

Tensors = Mapping[str, NDArray[np.float32]]
"""Arrays by name, float32, each of its spec's shape."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of one tensor in a payload; `offset` and `length` in bytes."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of a payload; `sha256` is its digest, 32 bytes."""

    entries: tuple[Entry, ...]
    payload_bytes: int
    sha256: bytes


@dataclass(frozen=True, eq=False)
class Selection:
    """Some tensors of a payload as a stream: the bytes of one after the other. Selections are told apart by identity.

    Attributes:
        tensors: Their positions in the manifest, ascending.
        ranges: Their bytes in the payload as (offset, length), in order; neighbours are one range.
    """

    tensors: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, manifest: Manifest, tensors: Sequence[int]) -> Selection:
        """Selects the tensors at these ascending positions of a manifest."""
        ranges: list[tuple[int, int]] = []
        for entry in (manifest.entries[i] for i in tensors):
            if ranges and sum(ranges[-1]) == entry.offset:
                ranges[-1] = ranges[-1][0], ranges[-1][1] + entry.length
            else:
                ranges.append((entry.offset, entry.length))
        return cls(tuple(tensors), tuple(ranges))

    @cached_property
    def _starts(self) -> list[int]:
        """Positions in the stream at which the ranges begin, and at which the last one ends."""
        return [0, *accumulate(length for _, length in self.ranges)]

    @property
    def size_bytes(self) -> int:
        """Length of the stream."""
        return self._starts[-1]

    def pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Yields where bytes `offset` to `offset + length` of the stream lie in the payload, as (offset, length)."""
        place = bisect_right(self._starts, offset) - 1
        while length > 0 and place < len(self.ranges):
            at, size = self.ranges[place]
            skipped = offset - self._starts[place]
            taken = min(length, size - skipped)
            yield at + skipped, taken
            offset, length, place = offset + taken, length - taken, place + 1


def missing(manifest: Manifest, spec: AdapterSpec, version: int, have: int | None) -> tuple[int, ...]:
    """Returns the positions in a version's manifest of the tensors that a client needs that holds another version.

    All of them, where it holds none, or where none can have changed and its bytes differ nevertheless.
    """
    changed = set() if have is None else {tensor.name for tensor in spec.changed(have, version)}
    needed = tuple(i for i, entry in enumerate(manifest.entries) if entry.name in changed)
    return needed or tuple(range(len(manifest.entries)))


def chunks(offset: int, end: int, now: Callable[[], float] = time.monotonic) -> Iterator[tuple[int, int]]:
    """Yields where the chunks of a transfer from byte `offset` to `end` begin, and how many bytes they have.

    Large ones pay where the line is fast. But gRPC hands over whole messages, so a chunk is no progress before its
    last byte: on a slow line they stay small, or become so. A chunk takes from when it is yielded until the next one is
    asked for, by the clock `now`.
    """
    size = FIRST_CHUNK_BYTES
    while offset < end:
        length, began = min(size, end - offset), now()
        yield offset, length
        offset, took_s = offset + length, now() - began
        if took_s < FAST_S:
            size = min(2 * size, CHUNK_BYTES)
        elif took_s > SLOW_S:
            size = max(size // 2, LEAST_CHUNK_BYTES)


def encode(tensors: Tensors, specs: Sequence[TensorSpec], encoding: str, seed: int = 0) -> tuple[Manifest, bytes]:
    """Writes the tensors that `specs` names, in that order, with one codec, or that of their section.

    Args:
        tensors: By name.
        specs: Those to write.
        encoding: Name of the codec.
        seed: Seed of the training that an update is of, for a codec that draws.

    Returns:
        The manifest and the payload.

    Raises:
        ManifestInvalid: If a tensor is missing or has not its spec's shape.
    """
    stream = io.BytesIO()
    manifest = write(stream, tensors, specs, encoding, seed)
    return manifest, stream.getvalue()


def write(stream: BinaryIO, tensors: Tensors, specs: Sequence[TensorSpec], encoding: str, seed: int = 0) -> Manifest:
    """Writes a payload to `stream`, holding one encoded tensor at a time; else as `encode`."""
    digest = hashlib.sha256()
    entries, offset = [], 0
    for spec in specs:
        own = spec.section.encoding or encoding
        if spec.name not in tensors:
            raise ManifestInvalid(f"tensor {spec.name} is missing")
        values = np.ascontiguousarray(tensors[spec.name], np.float32)
        if np.shape(tensors[spec.name]) != spec.shape:
            raise ManifestInvalid(
                f"tensor {spec.name} has shape {np.shape(tensors[spec.name])}; the spec says {spec.shape}"
            )
        part = codecs.get(own).seeded(seeds.encoding(seed, spec.name)).encode(values.reshape(-1))
        stream.write(part)
        digest.update(part)
        entries.append(Entry(spec.name, spec.shape, own, offset, len(part)))
        offset += len(part)
    return Manifest(tuple(entries), offset, digest.digest())


def check_manifest(manifest: Manifest, specs: Sequence[TensorSpec], encodings: Sequence[str]) -> None:
    """Checks a manifest from outside against the tensors it must describe, before anything is allocated.

    Raises:
        ManifestInvalid: With the first fault found: a tensor missing, unknown or out of order, a wrong shape, an
            encoding that is not among `encodings`, a gap, an overlap, or a length that no encoding of the tensor has.
    """
    given, wanted = [e.name for e in manifest.entries], [s.name for s in specs]
    if given != wanted:
        raise _name_fault(given, wanted)
    offset = 0
    for i, (entry, spec) in enumerate(zip(manifest.entries, specs, strict=True)):
        if entry.shape != spec.shape:
            raise entry_fault(i, "shape", spec.name, f"has shape {entry.shape}; the spec says {spec.shape}")
        allowed = (spec.section.encoding,) if spec.section.encoding else encodings
        if entry.encoding not in allowed:
            text = f"is encoded as {entry.encoding[:32]!r}; this run takes {', '.join(allowed)}"
            raise entry_fault(i, "encoding", spec.name, text)
        if entry.offset != offset:
            raise entry_fault(i, "offset", spec.name, f"begins at byte {entry.offset}, not at {offset}")
        low, high = codecs.get(entry.encoding).length_bounds(spec.size)
        if not low <= entry.length <= high:
            wants = f"{low}" if low == high else f"{low} to {high}"
            raise entry_fault(i, "length", spec.name, f"has {entry.length} bytes; {entry.encoding} has {wants}")
        offset += entry.length
    if manifest.payload_bytes != offset:
        text = f"is {manifest.payload_bytes}, the entries have {offset}"
        raise ManifestInvalid(f"payload_bytes {text}", (("payload_bytes", text),))


def entry_fault(i: int, field: str, name: str, text: str) -> ManifestInvalid:
    """Returns the error for a field of the entry at index `i` of a manifest, with that field's path."""
    return ManifestInvalid(f"tensor {name[:80]} {text}", ((f"tensors[{i}].{field}", text),))


def _name_fault(given: Sequence[str], wanted: Sequence[str]) -> ManifestInvalid:
    """Returns the error for the first difference between two lists of names."""
    unknown, missing = sorted(set(given) - set(wanted)), sorted(set(wanted) - set(given))
    if unknown:
        return entry_fault(given.index(unknown[0]), "name", unknown[0], "is not one that is sent here")
    if missing:
        return ManifestInvalid(f"tensor {missing[0]} is missing", (("tensors", f"has no tensor {missing[0]}"),))
    text = "are not in the spec's order, each once"
    return ManifestInvalid(f"the tensors {text}", (("tensors", text),))


def check_payload(manifest: Manifest, payload: memoryview, release: Callable[[], object] | None = None) -> None:
    """Checks every value of a payload whose manifest was checked.

    Args:
        manifest: Description of the payload.
        payload: Its bytes.
        release: Called now and then to give back what was read of a mapped file, so that memory stays flat.

    Raises:
        PayloadInvalid: If the payload is longer or shorter than its manifest says, or a tensor's
            bytes are malformed or hold a value that is not finite; message and field name the tensor.
    """
    _check_length(manifest, payload)
    for group, data in _released(manifest, payload, release):
        _check_group(manifest, payload, group, data)


def _check_length(manifest: Manifest, payload: memoryview) -> None:
    if len(payload) != manifest.payload_bytes:
        raise PayloadInvalid(f"the payload has {len(payload)} bytes; its manifest says {manifest.payload_bytes}")


def _check_group(manifest: Manifest, payload: memoryview, group: Sequence[Entry], data: memoryview) -> None:
    """Checks a group of tensors.

    Raises:
        PayloadInvalid: For the first one that is wrong by itself.
    """
    try:
        codecs.get(group[0].encoding).check(data, sum(math.prod(entry.shape) for entry in group))
    except PayloadInvalid:
        for entry in group:
            try:
                codecs.get(entry.encoding).check(_bytes_of(entry, payload), math.prod(entry.shape))
            except PayloadInvalid as error:
                fields = ((f"tensors[{manifest.entries.index(entry)}]", error.message),)
                raise PayloadInvalid(f"tensor {entry.name}: {error.message}", fields) from None
        raise


def squared_norm(manifest: Manifest, payload: memoryview, release: Callable[[], object] | None = None) -> float:
    """Returns the sum of the squares of all values of a checked payload, in float64.

    Args:
        manifest: Description of the payload.
        payload: Its bytes.
        release: Called now and then to give back what was read of a mapped file.
    """
    total, wide = 0.0, np.empty(BLOCK_ELEMENTS)
    for group, data in _released(manifest, payload, release):
        total = _add_squares(total, group, data, wide)
    return total


def checked_squared_norm(manifest: Manifest, payload: memoryview, release: Callable[[], object] | None = None) -> float:
    """Checks a payload and returns its squared norm, which reads it once: `check_payload`, then `squared_norm`.

    Where only values that are not finite can be wrong, the squares show it: those of finite ones have a finite sum.
    """
    _check_length(manifest, payload)
    total, wide = 0.0, np.empty(BLOCK_ELEMENTS)
    for group, data in _released(manifest, payload, release):
        is_dense = codecs.get(group[0].encoding).is_dense
        if not is_dense:
            _check_group(manifest, payload, group, data)
        with np.errstate(invalid="ignore"):  # a NaN that is to be found
            total = _add_squares(total, group, data, wide)
        if is_dense and not math.isfinite(total):
            _check_group(manifest, payload, group, data)
    return total


def _add_squares(total: float, group: Sequence[Entry], data: memoryview, wide: NDArray[np.float64]) -> float:
    """Returns a sum and the squares of a group's values, which are added to it tensor by tensor."""
    ends = list(accumulate(math.prod(entry.shape) for entry in group))
    for _, values in codecs.get(group[0].encoding).blocks(data, ends[-1]):
        # Not np.dot: BLAS would start threads of its own for every block.
        square = wide[: values.size]
        np.copyto(square, values)
        square *= square
        for tensor in np.split(square, ends[:-1]):  # a group of several tensors is one block
            total += float(tensor.sum())
    return total


def _released(
    manifest: Manifest, payload: memoryview, release: Callable[[], object] | None
) -> Iterator[tuple[list[Entry], memoryview]]:
    """Yields what `_groups` does, and gives back what was read of a mapped file in between."""
    resident = 0
    for group, data in _groups(manifest, payload):
        yield group, data
        resident += len(data)
        if release and resident > RESIDENT_BYTES:
            release()
            resident = 0


def decode(manifest: Manifest, payload: memoryview) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors of a payload, float32, in their shapes; check manifest and payload first."""
    return {
        entry.name: codecs.get(entry.encoding).decode(data, math.prod(entry.shape)).reshape(entry.shape)
        for entry, data in parts(manifest, payload)
    }


class Decoded(Mapping[str, NDArray[np.float32]]):
    """The tensors of a checked payload by name, each decoded when it is asked for, so that one at a time is in memory.

    Args:
        manifest: Description of the payload.
        payload: Its bytes.
        release: Called now and then to give back what was read of a mapped file.
    """

    def __init__(self, manifest: Manifest, payload: memoryview, release: Callable[[], object] | None = None) -> None:
        self._entries = {entry.name: entry for entry in manifest.entries}
        self._payload = payload
        self._release = release
        self._resident = 0

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        entry = self._entries[name]
        values = codecs.get(entry.encoding).decode(_bytes_of(entry, self._payload), math.prod(entry.shape))
        self._resident += entry.length
        if self._release and self._resident > RESIDENT_BYTES:
            self._release()
            self._resident = 0
        return values.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def parts(manifest: Manifest, payload: memoryview) -> Iterator[tuple[Entry, memoryview]]:
    """Yields each entry with its bytes, uncopied."""
    for entry in manifest.entries:
        yield entry, _bytes_of(entry, payload)


def _bytes_of(entry: Entry, payload: memoryview) -> memoryview:
    return payload[entry.offset : entry.offset + entry.length]


def _groups(manifest: Manifest, payload: memoryview) -> Iterator[tuple[list[Entry], memoryview]]:
    """Yields each entry with its bytes, or neighbours with theirs that a codec reads like one tensor of one block.

    NumPy gives the interpreter's lock back in every operation, and a server's threads wait for it each time: of an
    adapter of a hundred small tensors, one by one, a thread spent most of its time so.
    """
    group: list[Entry] = []
    elements = 0
    for entry in manifest.entries:
        n = math.prod(entry.shape)
        joins = group and entry.encoding == group[0].encoding and codecs.get(entry.encoding).joins
        if group and not (joins and elements + n <= BLOCK_ELEMENTS):
            yield group, _joined(group, payload)
            group, elements = [], 0
        group.append(entry)
        elements += n
    if group:
        yield group, _joined(group, payload)


def _joined(group: Sequence[Entry], payload: memoryview) -> memoryview:
    return payload[group[0].offset : group[-1].offset + group[-1].length]
