"""float16: IEEE 754 binary16, 2 bytes a value, 11 significant bits, at most 65,504 in magnitude.

Rounds to nearest, ties to even. A larger magnitude saturates to 65,504: an infinity would be refused by the server, and
with error feedback the rest goes up with the next update.
"""

from __future__ import annotations

import numpy as np

from fedpeft.codecs import Values, codecs
from fedpeft.codecs.dense import Bits, Dense

LARGEST = np.float32(65_504)


class Float16(Dense):
    """Half the bytes; magnitudes below 6e-5 lose precision, below 3e-8 become zero."""

    def narrow(self, values: Values) -> Bits:
        """See `Dense.narrow`."""
        return np.clip(values, -LARGEST, LARGEST).astype("<f2").view(self.bits)

    def widen(self, bits: Bits) -> Values:
        """See `Dense.widen`."""
        return bits.view("<f2").astype(np.float32)


FLOAT16 = Float16("float16", bits="<u2", exponent=0x7C00)
codecs.register(FLOAT16.name)(FLOAT16)
