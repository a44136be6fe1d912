"""int8: its error, and its range."""

import numpy as np
import pytest
from hypothesis import given

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs, scales

from .round_trip import TENSORS

INT8, SPARSE = codecs.get("int8"), codecs.get("sparse+int8")
LARGEST = np.finfo(np.float32).max


@given(x=TENSORS)
def test_the_error_is_at_most_half_a_scale(x: Values) -> None:
    data = memoryview(INT8.encode(x))
    INT8.check(data, x.size)
    scale = scales.spread(np.frombuffer(data[: 4 * scales.count(x.size)], np.float32), 0, x.size).astype(np.float64)
    error = np.abs(INT8.decode(data, x.size).astype(np.float64) - x)
    assert (error <= scale / 2).all()
    assert (scale <= np.maximum(np.abs(x).max() / 127 * (1 + 2.0**-16), 2.0**-126)).all()


@given(x=TENSORS)
def test_sparse_drops_no_value_but_zeros(x: Values) -> None:
    decoded = SPARSE.decode(memoryview(SPARSE.encode(x)), x.size)
    np.testing.assert_array_equal(np.sign(decoded), np.sign(x))


def test_blocks_do_not_meet() -> None:
    x = np.concatenate([np.full(128, 1e-6), [1e6], np.zeros(127), np.full(50, -1e-30)]).astype(np.float32)
    np.testing.assert_allclose(INT8.decode(memoryview(INT8.encode(x)), x.size), x, rtol=1e-4)


def test_zeros_and_the_ends_of_float32() -> None:
    x = np.array([LARGEST, -LARGEST, *[0.0] * 126, *[0.0] * 128, 1e-45, -1e-45], np.float32)
    decoded = INT8.decode(memoryview(INT8.encode(x)), x.size)
    assert np.isfinite(decoded).all() and not decoded[2:].any()
    np.testing.assert_allclose(decoded[:2], x[:2], rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "sparse+int8"])
def test_a_tensor_of_many_pieces(name: str) -> None:
    rng, codec = np.random.default_rng(1), codecs.get(name)
    x = rng.standard_normal(2 * BLOCK_ELEMENTS + 77).astype(np.float32)
    x[rng.random(x.size) < 0.5] = 0
    data = memoryview(codec.encode(x))
    codec.check(data, x.size)
    np.testing.assert_allclose(codec.decode(data, x.size), x, atol=float(np.abs(x).max()) / 254 * 2)
    assert codec.encode(codec.decode(data, x.size)) == bytes(data)
