"""Positions of the values that a sparse tensor keeps: gaps or a bit mask, checked and read a piece at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, varint
from fedpeft.errors import PayloadInvalid

Positions = NDArray[np.int64]

_SPARE_BYTES = 64
"""Read beyond the gaps that the last block took, so that one look is mostly enough."""


def mask_bytes(n: int) -> int:
    """Returns the bytes of a mask over n values."""
    return (n + 7) // 8


class GapReader:
    """Reads positions from checked gaps, in order, keeping only where it stands.

    Attributes:
        taken: Number of positions read so far.
    """

    def __init__(self, raw: varint.Bytes) -> None:
        self.taken = 0
        self._raw = raw
        self._offset = 0
        self._position = -1
        self._look = _SPARE_BYTES

    def take(self, start: int, stop: int) -> Positions:
        """Returns the kept positions in [start, stop), less start, int64; `start` is the last `stop`."""
        pieces = []
        begin = self._offset
        while self._offset < self._raw.size:
            gaps, ends = varint.read(self._raw[self._offset : self._offset + self._look])
            where = np.cumsum(gaps + 1) + self._position
            inside = int(np.searchsorted(where, stop))
            if inside:
                pieces.append(where[:inside] - start)
                self._offset += int(ends[inside - 1])
                self._position = int(where[inside - 1])
                self.taken += inside
            if inside < where.size:
                break
        used = self._offset - begin
        self._look = used + used // 4 + _SPARE_BYTES
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


class MaskReader:
    """Reads positions from a checked mask, in order.

    Attributes:
        taken: Number of positions read so far.
    """

    def __init__(self, raw: varint.Bytes) -> None:
        self.taken = 0
        self._raw = raw

    def take(self, start: int, stop: int) -> Positions:
        """Returns the kept positions in [start, stop), less start, int64; `start` is the last `stop`."""
        whole = np.unpackbits(self._raw[start // 8 : mask_bytes(stop)], bitorder="little")
        inside = np.flatnonzero(whole[start % 8 : start % 8 + stop - start])
        self.taken += inside.size
        return inside


def check_gaps(raw: varint.Bytes, count: int, n: int) -> None:
    """Checks that `raw` holds exactly `count` gaps that stay below n.

    Raises:
        PayloadInvalid: If not, or if a gap is malformed.
    """
    offset, position, found = 0, -1, 0
    while offset < raw.size:
        gaps, ends = varint.read(raw[offset : offset + BLOCK_ELEMENTS])
        if ends.size == 0:
            raise PayloadInvalid("the last position of sparse data does not end")
        offset += int(ends[-1])
        found += gaps.size
        position += int(gaps.sum()) + gaps.size
        if position >= n:
            raise PayloadInvalid(f"sparse data keeps position {position} of {n} values")
    if found != count:
        raise PayloadInvalid(f"sparse data has {found} positions and says {count}")


def check_mask(raw: varint.Bytes, count: int, n: int) -> None:
    """Checks that the mask `raw` of n values has `count` bits, none beyond n, and beats gaps.

    Raises:
        PayloadInvalid: If not.
    """
    if n % 8 and raw[-1] >> (n % 8):
        raise PayloadInvalid(f"the mask of sparse data has bits beyond its {n} values")
    pieces = range(0, raw.size, BLOCK_ELEMENTS)
    found = sum(int(np.bitwise_count(raw[i : i + BLOCK_ELEMENTS]).sum()) for i in pieces)
    if found != count:
        raise PayloadInvalid(f"the mask of sparse data has {found} bits and the count is {count}")
    if count <= raw.size and _gap_bytes(raw, n) <= raw.size:
        raise PayloadInvalid("sparse data has a mask where gaps are as short")


def _gap_bytes(raw: varint.Bytes, n: int) -> int:
    """Returns the bytes that the positions of a mask would take as gaps."""
    reader, total, last = MaskReader(raw), 0, -1
    for start in range(0, n, BLOCK_ELEMENTS):
        where = reader.take(start, min(start + BLOCK_ELEMENTS, n)) + start
        if where.size:
            total += int(varint.lengths(np.diff(where, prepend=last) - 1).sum())
            last = int(where[-1])
    return total
