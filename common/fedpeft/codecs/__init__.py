"""Codecs: ways of writing float32 values as bytes. One file an encoding; NumPy only.

A codec is stateless and works on one tensor at a time. What is lost by a lossy one is found by decoding again, so
error feedback needs nothing from the codec (`fedpeft.adapters.updates`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpeft.registry import Registry

Values = NDArray[np.float32]

BLOCK_ELEMENTS = 65_536
"""Elements decoded at once while folding: 256 KiB of float32, which stays in a core's cache."""


class Codec(ABC):
    """One encoding of a flat float32 tensor.

    Guarantees: `encode(x)` is the same for equal x, and equal seeds, on every machine; nothing is allocated in
    proportion to a claimed count or size before `check` has passed. Of one that is not random: a second pass through
    the codec changes nothing more; whatever passes `check` is what `encode` would write for the values it holds, so
    one tensor has one encoding.
    """

    name: str
    """The registered name, as the manifest writes it."""
    is_sparse: bool = False
    """True if zeros take no bytes: all but the largest values of an update become zero first (`codec.density`). An
    adapter version, and a section beside it, go in another encoding."""
    is_dense: bool = False
    """True if any bytes of the right length are an encoding, wrong only where a value is not finite."""
    joins: bool = False
    """True if the encodings of some tensors one after the other are that of all their values."""
    is_random: bool = False
    """True if `encode` draws from a seed, see `seeded`, so that a second pass changes the values again. Versions, which
    clients hold and pass on, and sections go in another encoding."""
    contracts: bool = True
    """False if the expected squared error can be larger than the values themselves: error feedback would add it up."""
    is_sum: bool = False
    """True if what is written are sums of updates times their weights, of which no run has its encoding: a reader has
    them to more than float32, and what a writer makes of float32 values is not all that there is."""

    def seeded(self, seed: int) -> Codec:
        """Returns the codec that draws from `seed`, a number of up to 63 bits: itself, if it draws nothing."""
        return self

    @abstractmethod
    def encode(self, values: Values) -> bytes:
        """Writes values, finite float32 [n], as little-endian bytes.

        A value beyond the encoding's range becomes its largest finite one, never an infinity.
        """

    @abstractmethod
    def check(self, data: memoryview, n: int) -> None:
        """Checks that `data` is an encoding of n finite values.

        Raises:
            PayloadInvalid: With what is wrong: length, order, bounds, or a value that is not finite.
        """

    @abstractmethod
    def blocks(self, data: memoryview, n: int, size: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, Values]]:
        """Yields (start, float32 [size, the last one less]) in order, covering 0 to n.

        Call `check` first. A block may be a read-only view of `data`, and between two blocks no more
        than a few dozen bytes are kept, so that thousands of these can run side by side.
        """

    @abstractmethod
    def length_bounds(self, n: int) -> tuple[int, int]:
        """Returns the fewest and most bytes that an encoding of n values can have."""

    def decode(self, data: memoryview, n: int) -> Values:
        """Returns all values, float32 [n]. Call `check` first."""
        out = np.empty(n, np.float32)
        for start, block in self.blocks(data, n):
            out[start : start + block.size] = block
        return out


codecs: Registry[Codec] = Registry("fedpeft.codecs", "fedpeft.codecs", "encoding")
