"""sum128: exact sums of weighted updates, the same bits in any order and any grouping, on any machine.

A sum is a fixed-point number of 128 bits for each value,

    high + low / 2^64,    high a signed integer of 64 bits, low an unsigned one.

A product of a weight and a float32 is exact in float64 for weights below 2^29. It is rounded to a multiple of 2^-64,
which depends on nothing but the two, and added without any error. So the sums of some clients and of others, added up,
are the sum of all of them. `MOST_ADDED` products or sums, each below `LARGEST`, can be added.

While it is added to, a sum is kept in three float64 numbers, whose units are 1, 2^-32 and 2^-64: adding integers below
2^53 in float64 is exact, and as fast as any other addition. Each has 1.5 times 2^52 units added to it: then an addition
rounds to whole units, and what it left over is found by subtraction and goes to the next one (J. Demmel and
H. D. Nguyen, "Parallel Reproducible Summation", 2015, do so with limbs of floating size).

Layout of one tensor of n values:

    sums        n signed integers of 128 bits, two's complement, little-endian, in units of 2^-64
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import BLOCK_ELEMENTS, Codec, Values, codecs
from fedpeft.errors import PayloadInvalid

LARGEST = 2.0**33
"""Every product and sum that is added has a smaller magnitude."""
MOST_ADDED = 2**17
"""Most products or sums that are added up; a round may have 100,000 clients."""

_BLOCK = 16_384
"""Values that are added at once: three limbs and what is between lie in a core's cache."""
_UNITS = (1.0, 2.0**-32, 2.0**-64)
_SHIFTS = np.array([[1.5 * 2.0**52 * unit] for unit in _UNITS])
_LOW_HALF = np.uint64(0xFFFF_FFFF)

Doubles: TypeAlias = NDArray[np.float64]
High: TypeAlias = NDArray[np.int64]
Low: TypeAlias = NDArray[np.uint64]


class TooLarge(Exception):
    """A product is not below `LARGEST`.

    Attributes:
        position: Of the largest one in what was to be added.
    """

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class ExactSum:
    """The sum of what is added, value by value; zero at first.

    Args:
        size: Number of values.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._limbs = np.empty((len(_UNITS), size))
        self._limbs[:] = _SHIFTS
        self._product, self._part = np.empty((2, min(size, _BLOCK)))

    def add(self, values: Values, weight: float) -> None:
        """Adds weight times values, finite float32 [size].

        Raises:
            TooLarge: If a product is not below `LARGEST`; nothing is added.
        """
        bound = max(float(values.max()), -float(values.min())) * weight if values.size else 0.0
        if bound >= LARGEST:
            raise TooLarge(int(np.abs(values).argmax()))
        carrying = self._limbs[0 if bound >= _UNITS[0] / 2 else 1 : -1]  # nothing of the others would be a whole unit
        for here in _blocks(self.size):
            product, part = (each[: here.stop - here.start] for each in (self._product, self._part))
            np.copyto(product, values[here])
            product *= weight
            for limb in carrying[:, here]:
                np.add(limb, product, out=part)
                limb -= part  # minus what is taken of the product
                product += limb
                limb[:] = part
            # Of the last one nothing goes on, so what is lost must not depend on what was added before.
            product += _SHIFTS[-1]
            product -= _SHIFTS[-1]
            self._limbs[-1, here] += product

    def add_sum(self, high: High, low: Low) -> None:
        """Adds another sum, of magnitudes below `LARGEST`."""
        self._limbs[0] += high
        self._limbs[1] += (low >> np.uint64(32)) * _UNITS[1]
        self._limbs[2] += (low & _LOW_HALF) * _UNITS[2]

    def total(self) -> tuple[High, Low]:
        """Returns the sum, int64 [size] and uint64 [size]."""
        high, low = np.empty(self.size, np.int64), np.empty(self.size, np.uint64)
        for here in _blocks(self.size):
            whole, middle, least = self._carried(here)
            up = np.floor(middle)
            high[here] = whole + up
            low[here] = ((middle - up) / _UNITS[1]).astype(np.uint64) << np.uint64(32)
            low[here] |= (least / _UNITS[2]).astype(np.uint64)
        return high, low

    def quotient(self, divisor: float) -> Doubles:
        """Returns the sum divided, float64 [size]; before that it is rounded, by less than 2^-52 of its magnitude."""
        out = np.empty(self.size)
        for here in _blocks(self.size):
            whole, middle, least = self._carried(here)
            nearest = np.floor(middle + 0.5)
            whole += nearest
            middle -= nearest  # at most one half, so that nothing is lost where the sum is small
            middle += least
            whole += middle
            np.divide(whole, divisor, out=out[here])
        return out

    def _carried(self, here: slice) -> Doubles:
        """Returns the three limbs of a block, the last one from 0 to the unit above: the same ones for the same sum."""
        limbs: Doubles = self._limbs[:, here] - _SHIFTS
        up = np.floor(limbs[2] / _UNITS[1])
        up *= _UNITS[1]
        limbs[2] -= up
        limbs[1] += up
        return limbs


def as_floats(high: High, low: Low) -> Doubles:
    """Returns sums as float64 [size]: the integer and the fraction of the magnitude are each rounded, and added."""
    negative = high < 0
    up = np.where(negative, ~low + np.uint64(1), low)
    whole = np.where(negative, ~high + (low == 0), high)
    magnitude = whole + up * _UNITS[2]
    return np.where(negative, -magnitude, magnitude)


def _blocks(size: int) -> Iterator[slice]:
    for start in range(0, size, _BLOCK):
        yield slice(start, min(start + _BLOCK, size))


_SUM = np.dtype([("low", "<u8"), ("high", "<i8")])
_BOUND = int(LARGEST)


class Sum128(Codec):
    """16 bytes a sum, exactly; float32 values are rounded to multiples of 2^-64, and cut off below 2^33."""

    name = "sum128"
    joins = True
    is_sum = True

    def encode(self, values: Values) -> bytes:
        """See `Codec.encode`; the sums of one update of weight 1."""
        total = ExactSum(values.size)
        total.add(np.clip(values, -_LAST, _LAST), 1.0)
        return self.write(*total.total())

    def write(self, high: High, low: Low) -> bytes:
        """Writes sums, int64 [n] and uint64 [n].

        Raises:
            OverflowError: If one is not below `LARGEST`.
        """
        if not _is_small(high).all():
            raise OverflowError(f"a sum is 2^{_BOUND.bit_length() - 1} or more")
        out = np.empty(high.size, _SUM)
        out["high"], out["low"] = high, low
        return out.tobytes()

    def check(self, data: memoryview, n: int) -> None:
        """See `Codec.check`."""
        if len(data) != n * _SUM.itemsize:
            raise PayloadInvalid(f"{n} values in {self.name} take {n * _SUM.itemsize} bytes, not {len(data)}")
        high = np.frombuffer(data, _SUM)["high"]
        for start in range(0, n, BLOCK_ELEMENTS):
            good = _is_small(high[start : start + BLOCK_ELEMENTS])
            if not good.all():
                place = start + int(good.argmin())
                raise PayloadInvalid(f"sum {place} is {high[place]}; sums below 2^{_BOUND.bit_length() - 1} are taken")

    def sums(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, High, Low]]:
        """Yields (start, high, low), int64 and uint64 [size, the last one less], in order; call `check` first."""
        sums = np.frombuffer(data, _SUM)
        for start in range(0, n, size):
            piece = sums[start : min(start + size, n)]
            yield start, piece["high"], piece["low"]

    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """See `Codec.blocks`; the sums rounded to float32."""
        for start, high, low in self.sums(data, n, size):
            yield start, as_floats(high, low).astype(np.float32)

    def length_bounds(self, n: int) -> tuple[int, int]:
        """See `Codec.length_bounds`."""
        return n * _SUM.itemsize, n * _SUM.itemsize


_LAST = np.nextafter(np.float32(LARGEST), np.float32(0))


def _is_small(high: High) -> NDArray[np.bool_]:
    """Returns True where a sum is below `LARGEST` by magnitude."""
    small: NDArray[np.bool_] = (high < _BOUND) & (high >= -_BOUND)
    return small


SUM128 = Sum128()
codecs.register(SUM128.name)(SUM128)
