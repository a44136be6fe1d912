"""int8: its error, its range, and that a second pass changes nothing."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs, scales
from fedpeft.errors import PayloadInvalid

INT8, SPARSE = codecs.get("int8"), codecs.get("sparse+int8")
LARGEST = np.finfo(np.float32).max

values = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = arrays(np.float32, st.integers(1, 300), elements=values | st.floats(-1, 1, width=32), fill=st.just(0.0))


@given(x=tensors)
def test_the_error_is_at_most_half_a_scale(x: Values) -> None:
    data = memoryview(INT8.encode(x))
    INT8.check(data, x.size)
    scale = scales.spread(np.frombuffer(data[: 4 * scales.count(x.size)], np.float32), 0, x.size).astype(np.float64)
    error = np.abs(INT8.decode(data, x.size).astype(np.float64) - x)
    assert (error <= scale / 2).all()
    assert (scale <= np.maximum(np.abs(x).max() / 127 * (1 + 2.0**-16), 2.0**-126)).all()


@given(x=tensors, name=st.sampled_from(["int8", "sparse+int8"]))
def test_a_second_pass_changes_nothing(x: Values, name: str) -> None:
    codec = codecs.get(name)
    data = codec.encode(x)
    low, high = codec.length_bounds(x.size)
    codec.check(memoryview(data), x.size)
    assert low <= len(data) <= high
    assert codec.encode(codec.decode(memoryview(data), x.size)) == data


@given(x=tensors)
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
@given(x=tensors, size=st.integers(1, 300))
def test_blocks_of_any_size_are_the_same_values(name: str, x: Values, size: int) -> None:
    codec = codecs.get(name)
    data = memoryview(codec.encode(x))
    pieces = list(codec.blocks(data, x.size, size))
    assert [start for start, _ in pieces] == list(range(0, x.size, size))
    np.testing.assert_array_equal(np.concatenate([b for _, b in pieces]), codec.decode(data, x.size))


@pytest.mark.parametrize("name", ["int8", "sparse+int8"])
def test_a_tensor_of_many_pieces(name: str) -> None:
    rng, codec = np.random.default_rng(1), codecs.get(name)
    x = rng.standard_normal(2 * BLOCK_ELEMENTS + 77).astype(np.float32)
    x[rng.random(x.size) < 0.5] = 0
    data = memoryview(codec.encode(x))
    codec.check(data, x.size)
    np.testing.assert_allclose(codec.decode(data, x.size), x, atol=float(np.abs(x).max()) / 254 * 2)
    assert codec.encode(codec.decode(data, x.size)) == bytes(data)


@pytest.mark.parametrize("name", ["int8", "sparse+int8"])
@given(x=tensors, data=st.data())
def test_a_changed_byte_is_refused_or_is_another_tensor(name: str, x: Values, data: st.DataObject) -> None:
    codec = codecs.get(name)
    encoded = bytearray(codec.encode(x))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    try:
        codec.check(memoryview(encoded), x.size)
    except PayloadInvalid:
        return
    decoded = codec.decode(memoryview(encoded), x.size)
    assert np.isfinite(decoded).all()
    assert codec.encode(decoded) == bytes(encoded)


@pytest.mark.parametrize("name", ["int8", "sparse+int8"])
def test_a_few_hostile_bytes_allocate_little(name: str) -> None:
    tracemalloc.start()
    try:
        for data in (b"", bytes(20), b"\x00\xff\xff\xff\xff\x07" + bytes(14), b"\x01\xff\xff\xff\xff\x07" + bytes(14)):
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(PayloadInvalid):
                codecs.get(name).check(memoryview(data), 2**31)
            assert tracemalloc.get_traced_memory()[1] - before < 16 * 1024
            tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()
