"""Gaussian noise from the operating system's cryptographic generator: no seed exists that could be written or guessed.

Box and Muller's transform of 53-bit uniforms; the largest value is 8.6 standard deviations, which a true Gaussian
exceeds with a probability of 10^-17.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

_BITS = 53


def gaussian(size: int) -> NDArray[np.float64]:
    """Returns independent standard normal values, float64 [size]."""
    half = (size + 1) // 2
    words = np.frombuffer(os.urandom(16 * half), np.uint64) >> np.uint64(64 - _BITS)
    uniform = (words + np.uint64(1)) * 2.0**-_BITS  # above 0, at most 1
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * math.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]
