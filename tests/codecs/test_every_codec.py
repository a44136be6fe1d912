"""The promises of `Codec`, of every codec that is registered: any values, any seed, any bytes from outside."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs
from fedpeft.errors import PayloadInvalid

from .round_trip import TENSORS, through

NAMES = codecs.names()
RANDOM = [name for name in NAMES if codecs.get(name).is_random]
each_codec = pytest.mark.parametrize("name", NAMES)


def test_each_has_its_name_and_there_are_some_of_both_kinds() -> None:
    assert all(codecs.get(name).name == name for name in NAMES)
    assert 0 < len(RANDOM) < len(NAMES)


@each_codec
@given(x=TENSORS)
def test_an_encoding_has_a_length_within_bounds_and_a_second_pass_changes_nothing(name: str, x: Values) -> None:
    codec = codecs.get(name)
    data, decoded = codec.encode(x), through(codec, x)
    low, high = codec.length_bounds(x.size)
    assert low <= len(data) <= high
    assert decoded.dtype == np.float32 and np.isfinite(decoded).all()
    assert codec.is_random or codec.is_sum or codec.encode(decoded) == data


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_names_the_bytes(name: str) -> None:
    x, codec = np.random.default_rng(1).standard_normal(BLOCK_ELEMENTS + 300).astype(np.float32), codecs.get(name)
    data = codec.seeded(5).encode(x)
    assert codec.seeded(5).encode(x) == data != codec.seeded(6).encode(x)
    assert codec.encode(x) == codec.seeded(0).encode(x), "seeded makes another codec"
    decoded = codec.seeded(9).decode(memoryview(data), x.size)
    np.testing.assert_array_equal(decoded, codec.decode(memoryview(data), x.size), "the bytes alone say the values")


@each_codec
@given(x=TENSORS, size=st.integers(1, 300))
def test_blocks_of_any_size_are_the_same_values(name: str, x: Values, size: int) -> None:
    codec = codecs.get(name)
    x = np.tile(x, 8)  # several of the pieces that a codec may work in
    data, size = memoryview(codec.encode(x)), 8 * size
    pieces = list(codec.blocks(data, x.size, size))
    assert [start for start, _ in pieces] == list(range(0, x.size, size))
    np.testing.assert_array_equal(np.concatenate([b for _, b in pieces]), codec.decode(data, x.size))


@each_codec
def test_zeros_and_the_ends_of_float32_stay_finite(name: str) -> None:
    most = np.finfo(np.float32).max
    x = np.concatenate([np.full(1024, most), np.zeros(1024), [1e-45, most, -most]]).astype(np.float32)
    decoded = through(codecs.get(name), x)
    assert np.isfinite(decoded).all() and not decoded[1024:2048].any()


@each_codec
@given(data=st.binary(max_size=64), n=st.integers(1, 200) | st.integers(1, 2**31))
def test_any_bytes_are_refused_or_are_finite_values_and_their_one_encoding(name: str, data: bytes, n: int) -> None:
    codec = codecs.get(name)
    try:
        codec.check(memoryview(data), n)
    except PayloadInvalid:
        return
    if n <= 4096:
        decoded = codec.decode(memoryview(data), n)
        assert np.isfinite(decoded).all()
        assert codec.is_random or codec.is_sum or codec.encode(decoded) == data


@each_codec
@given(x=TENSORS, data=st.data())
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
    assert codec.is_random or codec.is_sum or codec.encode(decoded) == bytes(encoded), (
        "the encoding of one tensor alone"
    )


@each_codec
def test_a_few_hostile_bytes_allocate_little(name: str) -> None:
    codec, rng = codecs.get(name), np.random.default_rng(3)
    counts = [b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x08"]
    heads = [b"", b"\x00", b"\x01", *(mode + count for mode in (b"\x00", b"\x01") for count in counts)]
    cases = [b"", bytes(20), *((head + rng.bytes(20))[:20] for head in heads for _ in range(20))]
    tracemalloc.start()
    try:
        for data in cases:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with pytest.raises(PayloadInvalid):
                codec.check(memoryview(data), 2**31)
            assert tracemalloc.get_traced_memory()[1] - before < 16 * 1024
    finally:
        tracemalloc.stop()
