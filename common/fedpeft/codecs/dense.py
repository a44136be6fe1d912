"""Common part of the dense encodings: every value in turn, in one little-endian float format."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, Values
from fedpeft.codecs.kept import KeptValues
from fedpeft.errors import PayloadInvalid

Bits = NDArray[np.unsignedinteger]
"""Values as the unsigned integers of their bit patterns, little-endian."""


class Dense(KeptValues):
    """One float format, given by how its bits convert from and to float32.

    Args:
        name: The registered name.
        bits: The little-endian unsigned integer type of the format's width.
        exponent: The bits of the exponent: all set in infinities and NaN, and in nothing else.
    """

    is_dense = True
    joins = True

    def __init__(self, name: str, bits: str, exponent: int) -> None:
        self.name = name
        self.bits = np.dtype(bits)
        self._exponent = self.bits.type(exponent)
        self._magnitude = self.bits.type((1 << (8 * self.bits.itemsize - 1)) - 1)

    @abstractmethod
    def narrow(self, values: Values) -> Bits:
        """Returns the bit patterns of values, float32 [n]; saturates beyond the format's range."""

    @abstractmethod
    def widen(self, bits: Bits) -> Values:
        """Returns float32 [n], exactly; a view where the format is float32 itself."""

    def view(self, data: memoryview) -> Bits:
        """Returns the bit patterns in `data`, whose length is a multiple of theirs, uncopied."""
        return np.frombuffer(data, self.bits)

    def encode(self, values: Values) -> bytes:
        """See `Codec.encode`."""
        return self.narrow(values).tobytes()

    def check(self, data: memoryview, n: int) -> None:
        """See `Codec.check`."""
        if len(data) != n * self.bits.itemsize:
            raise PayloadInvalid(f"{n} values in {self.name} take {n * self.bits.itemsize} bytes, not {len(data)}")
        self.check_finite(self.view(data))

    def check_finite(self, bits: Bits) -> None:
        """Refuses infinities and NaN.

        Raises:
            PayloadInvalid: With the position of the first.
        """
        for start in range(0, bits.size, BLOCK_ELEMENTS):
            bad = (bits[start : start + BLOCK_ELEMENTS] & self._exponent) == self._exponent
            if bad.any():
                raise PayloadInvalid(f"value {start + int(bad.argmax())} is not finite")

    def keeps(self, values: Values) -> NDArray[np.bool_]:
        """See `KeptValues.keeps`; zeros of either sign are dropped, and what the format rounds to them."""
        return ~self._zeros(self.narrow(values))

    def encode_kept(self, values: Values) -> bytes:
        """See `KeptValues.encode_kept`."""
        return self.encode(values)

    def zeros(self, data: memoryview, n: int, start: int, stop: int) -> NDArray[np.bool_]:
        """See `KeptValues.zeros`."""
        return self._zeros(self.view(data)[start:stop])

    def read(self, data: memoryview, n: int, start: int, stop: int) -> Values:
        """See `KeptValues.read`."""
        return self.widen(self.view(data)[start:stop])

    def _zeros(self, bits: Bits) -> NDArray[np.bool_]:
        zeros: NDArray[np.bool_] = (bits & self._magnitude) == 0
        return zeros

    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """See `Codec.blocks`."""
        for start in range(0, n, size):
            yield start, self.read(data, n, start, min(start + size, n))

    def length_bounds(self, n: int) -> tuple[int, int]:
        """See `Codec.length_bounds`."""
        return n * self.bits.itemsize, n * self.bits.itemsize
