"""float32: IEEE 754 binary32, 4 bytes a value, lossless."""

from __future__ import annotations

import numpy as np

from fedpeft.codecs import Values, codecs
from fedpeft.codecs.dense import Bits, Dense


class Float32(Dense):
    """The values as they are."""

    def narrow(self, values: Values) -> Bits:
        """See `Dense.narrow`."""
        return values.astype("<f4", copy=False).view(self.bits)

    def widen(self, bits: Bits) -> Values:
        """See `Dense.widen`."""
        return bits.view("<f4").astype(np.float32, copy=False)


FLOAT32 = Float32("float32", bits="<u4", exponent=0x7F80_0000)
codecs.register(FLOAT32.name)(FLOAT32)
