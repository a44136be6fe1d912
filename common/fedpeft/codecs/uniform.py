"""uniform2, uniform4, uniform8: rounded at random to one of 2^b - 1 levels (QSGD, arXiv 1610.02132, section 3.1).

Layout of one tensor of n values:

    scales      ceil(n / 128) float32: the step s of each block, see `fedpeft.codecs.scales` with 2^(b-1) - 1 levels
    codes       n codes of b bits, see `fedpeft.codecs.packing`: q + levels; the value is q s, exactly

q = floor(x / s + u) with u uniform on [0, 1): the mean of q s is x, and its error is below s. QSGD takes the levels
from the norm of a bucket; the largest magnitude here makes the steps of a block of 128 about a quarter as long.

The expected squared error of a block is at most s times the sum of the magnitudes but the largest, so at most
sqrt(127) / (2 levels) of its squared norm: below 1 with 4 bits, not with 2, where error feedback would add up.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, Codec, Values, codecs, packing, scales
from fedpeft.codecs.random_bytes import SEED_BITS, random_bytes
from fedpeft.codecs.scales import Scales
from fedpeft.errors import PayloadInvalid

WIDTHS = (2, 4, 8)


class Uniform(Codec):
    """Unbiased, 2^b - 1 levels.

    Args:
        bits: b, one of `WIDTHS`.
        seed: Of the rounding, at most 32 bits.
    """

    is_random = True

    def __init__(self, bits: int, seed: int = 0) -> None:
        self.name = f"uniform{bits}"
        self._bits = bits
        self._levels = (1 << (bits - 1)) - 1
        self._seed = seed
        self.contracts = (2 * self._levels) ** 2 > scales.BLOCK - 1

    def seeded(self, seed: int) -> Codec:
        """See `Codec.seeded`."""
        return Uniform(self._bits, seed % (1 << SEED_BITS))

    def encode(self, values: Values) -> bytes:
        """See `Codec.encode`."""
        heads, bodies = [], []
        for index, start in enumerate(range(0, values.size, BLOCK_ELEMENTS)):
            piece = values[start : start + BLOCK_ELEMENTS]
            own = scales.scales_of(piece, self._levels)
            drawn = random_bytes(self._seed, index, 4 * piece.size).view("<u4") * 2.0**-32
            q = np.clip(np.floor(scales.quotients(piece, own) + drawn), -self._levels, self._levels)
            heads.append(own.astype("<f4").tobytes())
            bodies.append(packing.pack((q + self._levels).astype(np.uint8), self._bits).tobytes())
        return b"".join([*heads, *bodies])

    def check(self, data: memoryview, n: int) -> None:
        """See `Codec.check`."""
        size = self.length_bounds(n)[0]
        if len(data) != size:
            raise PayloadInvalid(f"{n} values in {self.name} take {size} bytes, not {len(data)}")
        every, raw = self._split(data, n)
        scales.check(every, self._levels)
        if n * self._bits % 8 and raw[-1] >> (n * self._bits % 8):
            raise PayloadInvalid(f"the codes of {self.name} have bits beyond the {n} values")
        for start in range(0, n, BLOCK_ELEMENTS):
            codes = packing.unpack(raw, self._bits, start, min(start + BLOCK_ELEMENTS, n))
            if (codes > 2 * self._levels).any():
                i = start + int(codes.argmax())
                raise PayloadInvalid(f"code {i} is {codes.max()}; {self.name} has those from 0 to {2 * self._levels}")

    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """See `Codec.blocks`."""
        every, raw = self._split(data, n)
        for start in range(0, n, size):
            stop = min(start + size, n)
            q = packing.unpack(raw, self._bits, start, stop).astype(np.float32) - np.float32(self._levels)
            yield start, q * scales.spread(every, start, stop)

    def length_bounds(self, n: int) -> tuple[int, int]:
        """See `Codec.length_bounds`."""
        size = 4 * scales.count(n) + packing.packed_bytes(n, self._bits)
        return size, size

    def _split(self, data: memoryview, n: int) -> tuple[Scales, NDArray[np.uint8]]:
        head = 4 * scales.count(n)
        return np.frombuffer(data[:head], "<f4").astype(np.float32, copy=False), np.frombuffer(data[head:], np.uint8)


for _bits in WIDTHS:
    _codec = Uniform(_bits)
    codecs.register(_codec.name)(_codec)
