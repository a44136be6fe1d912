"""Values, and their way through a codec."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpeft.codecs import Codec, Values

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
TENSORS = arrays(
    np.float32, st.integers(1, 300), elements=FINITE | st.floats(-1, 1, width=32) | st.just(0.0), fill=st.just(0.0)
)


def through(codec: Codec, x: Values) -> Values:
    """Returns what a server has of values: checked and decoded."""
    data = memoryview(codec.encode(x))
    codec.check(data, x.size)
    return codec.decode(data, x.size)
