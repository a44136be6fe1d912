"""bfloat16: the upper half of float32, 2 bytes a value, 8 significant bits, float32's range.

Rounds to nearest, ties to even. Magnitudes above the largest finite one (3.39e38) saturate to it: float32 reaches a
little further, and rounding those up would make an infinity.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fedpeft.codecs import Values, codecs
from fedpeft.codecs.dense import Bits, Dense

LARGEST = np.uint32(0x7F7F_0000).view(np.float32)


class BFloat16(Dense):
    """Half the bytes at float32's range."""

    def narrow(self, values: Values) -> Bits:
        """See `Dense.narrow`."""
        rounded = np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.bfloat16)
        return rounded.view(np.uint16).astype(self.bits, copy=False)

    def widen(self, bits: Bits) -> Values:
        """See `Dense.widen`."""
        # A shift of the bits is the exact conversion and several times faster than a cast.
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


BFLOAT16 = BFloat16("bfloat16", bits="<u2", exponent=0x7F80)
codecs.register(BFLOAT16.name)(BFLOAT16)
