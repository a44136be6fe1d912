"""Codes of a few bits one after the other: the lowest bit of the first code is the lowest bit of the first byte."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def packed_bytes(n: int, bits: int) -> int:
    """Returns the bytes of n codes."""
    return (n * bits + 7) // 8


def pack(codes: Codes, bits: int) -> Codes:
    """Returns the bytes of codes, uint8 [n], each below 2^bits; the bits beyond the last are zero."""
    each = np.unpackbits(codes[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(each, bitorder="little")


def unpack(raw: Codes, bits: int, start: int, stop: int) -> Codes:
    """Returns the codes from `start` to `stop`, uint8 [stop - start], of their bytes."""
    first = start * bits
    flat = np.unpackbits(raw[first // 8 : packed_bytes(stop, bits)], bitorder="little")
    each = flat[first % 8 :][: (stop - start) * bits].reshape(-1, bits)
    return np.packbits(each, axis=1, bitorder="little")[:, 0]
