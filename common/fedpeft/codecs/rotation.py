"""Random rotations of chunks: random signs, then a Hadamard transform; and sums in one order.

Additions and subtractions in a stated order only, so that every machine has the same bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs.random_bytes import random_bytes

Doubles = NDArray[np.float64]


def hadamard(chunks: Doubles) -> Doubles:
    """Returns the Walsh-Hadamard transform of each chunk, in natural order and not normalised.

    Args:
        chunks: float64 [size, m], a chunk a column, so that every step is over memory in order; size a power of two.
    """
    size, m = chunks.shape
    out: Doubles = chunks
    half = 1
    while half < size:
        pairs = out.reshape(size // (2 * half), 2, half, m)
        step: Doubles = np.empty_like(pairs)
        np.add(pairs[:, 0], pairs[:, 1], out=step[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=step[:, 1])
        out = step.reshape(size, m)
        half *= 2
    return out


def signs(seed: int, first: int, m: int, size: int) -> Doubles:
    """Returns the signs of chunks `first` to `first + m`, float64 [size, m] of 1 and -1; size a multiple of 8."""
    drawn = np.stack([random_bytes(seed, index, size // 8) for index in range(first, first + m)], axis=1)
    bits = np.unpackbits(drawn, axis=0, bitorder="little")
    return 1.0 - 2.0 * bits.astype(np.float64)


def column_sums(chunks: Doubles) -> Doubles:
    """Returns the sum of each column, float64 [m], by adding the lower half to the upper until one row is left."""
    while len(chunks) > 1:
        half = len(chunks) // 2
        chunks = chunks[:half] + chunks[half:]
    total: Doubles = chunks[0]
    return total
