"""Gaussian noise from the operating system's cryptographic generator: no seed exists that could be written or guessed.

Box and Muller's transform of 53-bit uniforms; the largest value is 8.6 standard deviations, which a true Gaussian
exceeds with a probability of 10^-17.

Nothing that differs between two computers' floats must tell what the noise was added to: values are rounded to
multiples of a grid 2^-32 of the bound, the noise is added, and the result is rounded to the grid again, so that it is a
function of the rounded values plus noise. Rounding moves two neighbours apart by at most the square root of the number
of values, in grid steps, which the noise is scaled up for: by a millionth where there are twenty million values.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BITS = 53
_GRID = 32
"""A grid step is at most the bound times 2^-_GRID: sums of a million clients are exact in float64."""


def gaussian(size: int) -> NDArray[np.float64]:
    """Returns independent standard normal values, float64 [size]."""
    half = (size + 1) // 2
    words = np.frombuffer(os.urandom(16 * half), np.uint64) >> np.uint64(64 - _BITS)
    uniform = (words + np.uint64(1)) * 2.0**-_BITS  # above 0, at most 1
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * math.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


@dataclass(frozen=True, slots=True)
class GriddedNoise:
    """Noise for values on a grid.

    Attributes:
        sigma: Standard deviation of the noise of each value.
        grid: Distance of two neighbours on it, a power of two.
    """

    sigma: float
    grid: float

    @classmethod
    def of(cls, bound: float, noise_multiplier: float, values: int) -> GriddedNoise:
        """Returns the noise that hides a contribution.

        Args:
            bound: C, the most of its Euclidean norm over all values.
            noise_multiplier: Standard deviation of the noise in bounds: z.
            values: Number of values, of all tensors together.
        """
        grid = 2.0 ** (math.frexp(bound)[1] - 1 - _GRID)
        return cls(noise_multiplier * (bound + math.sqrt(values) * grid), grid)

    def add(self, values: NDArray[np.float64], divisor: float = 1.0) -> None:
        """Adds noise to some of the values, in place, and divides them: what is left is safe to publish.

        Args:
            values: Any shape.
            divisor: That.
        """
        np.rint(values / self.grid, out=values)
        values += gaussian(values.size).reshape(values.shape) * (self.sigma / self.grid)
        np.rint(values, out=values)
        values *= self.grid / divisor
