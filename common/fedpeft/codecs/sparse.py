"""sparse: the values that are not zero, and where they are.

Layout of one tensor of n values, of which `count` are kept:

    mode        1 byte: 0 gaps, 1 mask
    count       varint (LEB128, at most 5 bytes, no longer than needed)
    positions   gaps: for each kept value the number of dropped ones since the one before, as varints;
                mask: ceil(n / 8) bytes, bit i % 8 (lowest first) of byte i // 8 says that value i is kept
    values      count values in a dense encoding or int8, none of them zero, none infinite or NaN

The mode is the one with fewer bytes of positions, gaps if equal (which is near density 1/8); bits of the mask beyond
n are zero. So every tensor has one encoding, and positions that are twice there, or out of order, cannot be written. A
value that becomes zero in the dense encoding is not kept; zeros lose their sign. The blocks of int8 are of kept values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, Codec, Values, codecs, varint
from fedpeft.codecs.bfloat16 import BFLOAT16
from fedpeft.codecs.float16 import FLOAT16
from fedpeft.codecs.float32 import FLOAT32
from fedpeft.codecs.int8 import INT8
from fedpeft.codecs.kept import KeptValues
from fedpeft.codecs.positions import GapReader, MaskReader, check_gaps, check_mask, mask_bytes
from fedpeft.errors import PayloadInvalid

GAPS, MASK = 0, 1


@dataclass(frozen=True, slots=True)
class _Sections:
    """The parts of one encoded tensor, uncopied."""

    mode: int
    count: int
    positions: NDArray[np.uint8]
    values: memoryview


class Sparse(Codec):
    """The values that are not zero, in an encoding of their own, and where they are."""

    is_sparse = True

    def __init__(self, values: KeptValues) -> None:
        self.name = f"sparse+{values.name}"
        self._values = values

    def encode(self, values: Values) -> bytes:
        """See `Codec.encode`."""
        kept = self._values.keeps(values)
        where = np.flatnonzero(kept)
        gaps = np.diff(where, prepend=-1) - 1
        if int(varint.lengths(gaps).sum()) <= mask_bytes(values.size):
            mode, positions = GAPS, varint.write(gaps)
        else:
            mode, positions = MASK, np.packbits(kept, bitorder="little")
        head = bytes([mode]) + varint.write(np.array([where.size])).tobytes()
        return head + positions.tobytes() + self._values.encode_kept(values[where])

    def check(self, data: memoryview, n: int) -> None:
        """See `Codec.check`."""
        parts = self._split(data, n)
        (check_gaps if parts.mode == GAPS else check_mask)(parts.positions, parts.count, n)
        self._values.check(parts.values, parts.count)
        for start in range(0, parts.count, BLOCK_ELEMENTS):
            zeros = self._values.zeros(parts.values, parts.count, start, start + BLOCK_ELEMENTS)
            if zeros.any():
                raise PayloadInvalid(f"kept value {start + int(zeros.argmax())} is zero")

    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """See `Codec.blocks`."""
        parts = self._split(data, n)
        reader = (GapReader if parts.mode == GAPS else MaskReader)(parts.positions)
        for start in range(0, n, size):
            yield start, self._block(reader, parts, start, min(start + size, n))

    def _block(self, reader: GapReader | MaskReader, parts: _Sections, start: int, stop: int) -> Values:
        first = reader.taken
        kept = reader.take(start, stop)
        block = np.zeros(stop - start, np.float32)
        block[kept] = self._values.read(parts.values, parts.count, first, reader.taken)
        return block

    def length_bounds(self, n: int) -> tuple[int, int]:
        """See `Codec.length_bounds`."""
        full = self._values.length_bounds(n)[1]
        return 2, 1 + int(varint.lengths(np.array([n]))[0]) + mask_bytes(n) + full

    def _split(self, data: memoryview, n: int) -> _Sections:
        """Finds the parts; refuses a header that does not fit the length, before any part is read."""
        raw = np.frombuffer(data, np.uint8)
        if raw.size < 2 or raw[0] not in (GAPS, MASK):
            raise PayloadInvalid("sparse data begins with its mode, 0 or 1, and a count")
        numbers, ends = varint.read(raw[1 : 2 + int(np.argmax(raw[1 : 1 + varint.MAX_BYTES] < 0x80))])
        if numbers.size == 0:
            raise PayloadInvalid("the count of sparse data does not end")
        mode, count, head = int(raw[0]), int(numbers[0]), 1 + int(ends[0])
        if count > n:
            raise PayloadInvalid(f"sparse data keeps {count} of {n} values")
        width = raw.size - head - self._values.length_bounds(count)[0]
        low, high = (mask_bytes(n) if mode == MASK else count), mask_bytes(n)
        if not low <= width <= high:
            raise PayloadInvalid(f"sparse data has {raw.size} bytes; positions would have {width}, not {low} to {high}")
        return _Sections(mode, count, raw[head : head + width], data[head + width :])


for _values in (FLOAT32, FLOAT16, BFLOAT16, INT8):
    _codec = Sparse(_values)
    codecs.register(_codec.name)(_codec)
