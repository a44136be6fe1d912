"""int8: one signed byte a value, times a scale of its block (as 8-bit optimisers do, arXiv 2110.02861, section 2.1).

Layout of one tensor of n values:

    scales      ceil(n / 128) float32: s of each block, see `fedpeft.codecs.scales` with 127 levels
    values      n signed bytes q of -127 to 127; the value is q s, exactly

q is x / s rounded to nearest, ties to even, so the error is at most s / 2. The largest |q| of a block is 127, or its
scale is the smallest there is: a second pass changes nothing more. Behind `sparse+` no kept value becomes zero: what
would round to it becomes 1 or -1, with an error below s.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs, scales
from fedpeft.codecs.kept import KeptValues
from fedpeft.codecs.scales import Scales
from fedpeft.errors import PayloadInvalid

LEVELS = 127

Bytes = NDArray[np.int8]


class Int8(KeptValues):
    """A quarter of the bytes of float32, and 3 % for the scales; zeros lose their sign."""

    name = "int8"

    def encode(self, values: Values) -> bytes:
        """See `Codec.encode`."""
        return _write(values, nonzero=False)

    def check(self, data: memoryview, n: int) -> None:
        """See `Codec.check`."""
        if len(data) != _size(n):
            raise PayloadInvalid(f"{n} values in int8 take {_size(n)} bytes, not {len(data)}")
        every, whole = _split(data, n)
        scales.check(every, LEVELS)
        for start in range(0, n, BLOCK_ELEMENTS):
            q = np.abs(whole[start : start + BLOCK_ELEMENTS].astype(np.int16))
            peaks = np.maximum.reduceat(q, np.arange(0, q.size, scales.BLOCK))
            first = start // scales.BLOCK
            fits = (peaks == LEVELS) | ((peaks < LEVELS) & (every[first : first + peaks.size] == scales.SMALLEST))
            if not fits.all():
                i = int(fits.argmin())
                raise PayloadInvalid(f"the largest byte of block {first + i} is {peaks[i]}, not {LEVELS}")

    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """See `Codec.blocks`."""
        for start in range(0, n, size):
            yield start, self.read(data, n, start, min(start + size, n))

    def length_bounds(self, n: int) -> tuple[int, int]:
        """See `Codec.length_bounds`."""
        return _size(n), _size(n)

    def keeps(self, values: Values) -> NDArray[np.bool_]:
        """See `KeptValues.keeps`."""
        kept: NDArray[np.bool_] = values != 0
        return kept

    def encode_kept(self, values: Values) -> bytes:
        """See `KeptValues.encode_kept`."""
        return _write(values, nonzero=True)

    def zeros(self, data: memoryview, n: int, start: int, stop: int) -> NDArray[np.bool_]:
        """See `KeptValues.zeros`."""
        zeros: NDArray[np.bool_] = _split(data, n)[1][start:stop] == 0
        return zeros

    def read(self, data: memoryview, n: int, start: int, stop: int) -> Values:
        """See `KeptValues.read`."""
        every, whole = _split(data, n)
        return whole[start:stop] * scales.spread(every, start, stop)


def _size(n: int) -> int:
    return 4 * scales.count(n) + n


def _split(data: memoryview, n: int) -> tuple[Scales, Bytes]:
    head = 4 * scales.count(n)
    return np.frombuffer(data[:head], "<f4").astype(np.float32, copy=False), np.frombuffer(data[head:], np.int8)


def _write(values: Values, nonzero: bool) -> bytes:
    heads, bodies = [], []
    for start in range(0, values.size, BLOCK_ELEMENTS):
        piece = values[start : start + BLOCK_ELEMENTS]
        own = scales.scales_of(piece, LEVELS)
        q = np.clip(np.rint(scales.quotients(piece, own)), -LEVELS, LEVELS)
        if nonzero:
            q = np.where(q == 0, np.sign(piece), q)
        heads.append(own.astype("<f4").tobytes())
        bodies.append(q.astype(np.int8).tobytes())
    return b"".join([*heads, *bodies])


INT8 = Int8()
codecs.register(INT8.name)(INT8)
