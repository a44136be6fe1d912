"""LEB128 variable-length integers, many at once: 7 bits a byte, lowest first, the top bit says that more follow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PayloadInvalid

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

MAX_BYTES = 5
"""Enough for 35 bits; positions in a tensor have at most 31."""


def lengths(numbers: Integers) -> Integers:
    """Returns how many bytes each number takes, int64 [n]; numbers are at least 0 and below 2^35."""
    taken = np.ones(numbers.size, np.int64)
    for j in range(1, MAX_BYTES):
        taken += numbers >= 1 << (7 * j)
    return taken


def write(numbers: Integers) -> Bytes:
    """Returns the bytes of all numbers one after the other, each as short as it can be."""
    taken = lengths(numbers)
    ends = np.cumsum(taken)
    out = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    first = ends - taken
    for j in range(int(taken.max(initial=0))):
        those = taken > j
        more = (taken[those] > j + 1).astype(np.uint8) << 7
        out[first[those] + j] = (numbers[those] >> (7 * j) & 0x7F).astype(np.uint8) | more
    return out


def read(data: Bytes) -> tuple[Integers, Integers]:
    """Reads all numbers that end within `data`.

    Args:
        data: Bytes that begin at the beginning of a number, uint8.

    Returns:
        The numbers, int64 [m], and for each the position after its last byte, int64 [m].

    Raises:
        PayloadInvalid: If a number is longer than MAX_BYTES, or longer than it need be.
    """
    ends = np.flatnonzero(data < 0x80) + 1
    begins = np.concatenate(([0], ends[:-1])) if ends.size else ends
    taken = ends - begins
    unfinished = data.size - (int(ends[-1]) if ends.size else 0)
    if max(int(taken.max(initial=0)), unfinished + 1) > MAX_BYTES:
        raise PayloadInvalid(f"a position takes more than {MAX_BYTES} bytes")
    numbers = (data[begins] & 0x7F).astype(np.int64)
    for j in range(1, int(taken.max(initial=0))):
        those = np.flatnonzero(taken > j)
        numbers[those] |= (data[begins[those] + j] & 0x7F).astype(np.int64) << (7 * j)
    if ((taken > 1) & (data[ends - 1] == 0)).any():
        raise PayloadInvalid("a position is written with more bytes than it needs")
    return numbers, ends
