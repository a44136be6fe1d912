"""Values that a sparse tensor keeps: the part of an encoding that can stand behind `sparse+`."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import Codec, Values


class KeptValues(Codec):
    """A codec whose values `sparse` can keep.

    Guarantees: of the kept values none becomes zero, and a second pass keeps the same ones.
    """

    @abstractmethod
    def keeps(self, values: Values) -> NDArray[np.bool_]:
        """Returns the values, of float32 [n], that stay; the others count as zero."""

    @abstractmethod
    def encode_kept(self, values: Values) -> bytes:
        """Writes values, float32 [count], all of which `keeps` kept."""

    @abstractmethod
    def zeros(self, data: memoryview, n: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Returns the zeros, which are refused, among the values from `start` to `stop` of n in checked data."""

    @abstractmethod
    def read(self, data: memoryview, n: int, start: int, stop: int) -> Values:
        """Returns the values from `start` to `stop` of n in checked data, float32."""
