"""Random bytes of a seed, the same in every language: SHAKE128 (FIPS 202), which needs no arithmetic of its own."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

SEED_BITS = 32
"""Bits of a codec's seed: enough for no two tensors of a round to meet, few enough to be sent with each."""


def random_bytes(seed: int, index: int, count: int) -> NDArray[np.uint8]:
    """Returns the first `count` bytes of SHAKE128 of seed and index, each as 4 little-endian bytes; uint8 [count]."""
    text = seed.to_bytes(4, "little") + index.to_bytes(4, "little")
    return np.frombuffer(hashlib.shake_128(text).digest(count), np.uint8)
