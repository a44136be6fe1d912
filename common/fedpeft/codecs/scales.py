"""Scales of blocks: each 128 values in turn share one, so that a large value costs only its neighbours precision.

A block of 128 pays 4 bytes for its scale, a quarter of a bit a value. Larger blocks save little of that, but their
error grows with the largest value they hold; smaller ones, of 32, would pay a whole bit.

A scale is the least float32 of 17 significant bits that is at least (largest magnitude) / levels, 2^-126 at least.
So few bits make the product with an integer of up to 7 bits exact in float32, and the largest magnitude of a block
becomes exactly `levels` of its scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import Values
from fedpeft.errors import PayloadInvalid

Scales = NDArray[np.float32]
Doubles = NDArray[np.float64]

BLOCK = 128
"""Values that share a scale; divides `BLOCK_ELEMENTS`."""

SMALLEST = np.float32(2.0**-126)
"""Scale of blocks that hold nothing larger, zeros alone among them: the smallest normal number."""

_DROPPED_BITS_OF_DOUBLE = np.uint64((1 << 36) - 1)
_DROPPED_BITS = np.uint32((1 << 7) - 1)


def count(n: int) -> int:
    """Returns the number of scales of n values."""
    return -(-n // BLOCK)


def largest(levels: int) -> np.float32:
    """Returns the largest scale: `levels` of it are finite in float32."""
    quotient = np.float64(np.finfo(np.float32).max) / levels
    return np.float32((quotient.view(np.uint64) & ~_DROPPED_BITS_OF_DOUBLE).view(np.float64))


def scales_of(values: Values, levels: int) -> Scales:
    """Returns the scale of each block of values, float32 [n], n at least 1."""
    peaks = np.maximum.reduceat(np.abs(values), np.arange(0, values.size, BLOCK))
    bits = (peaks.astype(np.float64) / levels).view(np.uint64)
    above = ((bits + _DROPPED_BITS_OF_DOUBLE) & ~_DROPPED_BITS_OF_DOUBLE).view(np.float64)
    return np.clip(above, SMALLEST, largest(levels)).astype(np.float32)


def quotients(values: Values, scales: Scales) -> Doubles:
    """Returns each value divided by the scale of its block, float64 [n]."""
    return values / spread(scales, 0, values.size).astype(np.float64)


def spread(scales: Scales, start: int, stop: int) -> Scales:
    """Returns the scale of each of the values from `start` to `stop`, float32 [stop - start]."""
    first = start // BLOCK
    each = np.repeat(scales[first : count(stop)], BLOCK)
    return each[start - first * BLOCK :][: stop - start]


def check(scales: Scales, levels: int) -> None:
    """Checks scales from outside.

    Raises:
        PayloadInvalid: If one is not of 17 significant bits between the smallest and the largest.
    """
    fits = (scales >= SMALLEST) & (scales <= largest(levels)) & (scales.view(np.uint32) & _DROPPED_BITS == 0)
    if not fits.all():
        i = int(fits.argmin())
        raise PayloadInvalid(
            f"scale {i} is {scales[i]}, not a number of 17 bits from {SMALLEST:.9g} to {largest(levels):.9g}"
        )
