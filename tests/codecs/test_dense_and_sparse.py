"""Dense and sparse encodings: round trips, the shorter positions, and malformed data."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs, varint
from fedpeft.errors import PayloadInvalid

from .round_trip import TENSORS, through

DENSE = ["float32", "float16", "bfloat16"]
ALL = [*DENSE, *(f"sparse+{name}" for name in DENSE)]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LARGEST = {name: np.float32(ml_dtypes.finfo(dtype).max) for name, dtype in DTYPES.items()}

each_codec = pytest.mark.parametrize("name", ALL)


def narrowed(x: Values, dense: str) -> Values:
    """Applies a dense encoding to x by another way: ml_dtypes' and NumPy's own casts."""
    return np.clip(x, -LARGEST[dense], LARGEST[dense]).astype(DTYPES[dense]).astype(np.float32)


@each_codec
@given(x=TENSORS)
def test_what_arrives_is_what_another_cast_makes(name: str, x: Values) -> None:
    np.testing.assert_array_equal(through(codecs.get(name), x), narrowed(x, name.removeprefix("sparse+")))


@pytest.mark.parametrize("name", DENSE)
def test_dense_keeps_every_finite_bit_pattern(name: str) -> None:
    codec = codecs.get(name)
    if name == "float32":
        every = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
        every = every[(every & 0x7F800000) != 0x7F800000]
    else:
        exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}[name]
        every = np.arange(2**16, dtype=np.uint16)
        every = every[(every & exponent) != exponent]
    data = memoryview(every.tobytes())
    codec.check(data, every.size)
    assert codec.encode(codec.decode(data, every.size)) == bytes(data)


@each_codec
def test_too_large_saturates(name: str) -> None:
    most = np.float32(np.finfo(np.float32).max)
    x = np.array([most, -most, 65_519.9, 65_520, 0], np.float32)
    decoded = through(codecs.get(name), x)
    largest = LARGEST[name.removeprefix("sparse+")]
    assert decoded[0] == largest and decoded[1] == -largest
    assert np.isfinite(decoded).all()


@each_codec
def test_not_finite_is_refused(name: str) -> None:
    codec = codecs.get(name)
    bad = {"float32": "0000807f", "float16": "007c", "bfloat16": "c0ff"}[name.removeprefix("sparse+")]
    one = codec.encode(np.ones(3, np.float32))
    data = one[: -len(bad) // 2] + bytes.fromhex(bad)
    with pytest.raises(PayloadInvalid, match="value 2 is not finite"):
        codec.check(memoryview(data), 3)


@each_codec
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01, 0.1, 0.124, 0.126, 0.5, 1.0])
def test_large_tensors_over_many_blocks(name: str, density: float) -> None:
    rng = np.random.default_rng(7)
    n = 3 * BLOCK_ELEMENTS + 5
    x = np.where(rng.random(n) < density, rng.standard_normal(n), 0).astype(np.float32)
    codec = codecs.get(name)
    decoded = through(codec, x)
    np.testing.assert_array_equal(decoded, narrowed(x, name.removeprefix("sparse+")))
    assert codec.encode(decoded) == codec.encode(x)


def test_gaps_of_more_than_a_byte_across_blocks() -> None:
    x = np.zeros(5_000_000, np.float32)
    x[[0, 127, 256, 20_000, 2_500_000, 4_999_999]] = [1, -2, 3, -4, 5, -6]
    np.testing.assert_array_equal(through(codecs.get("sparse+float32"), x), x)


def test_sparse_takes_the_shorter_positions() -> None:
    codec = codecs.get("sparse+float32")
    x = np.zeros(800, np.float32)
    x[:100] = 1  # 100 gaps of a byte, and a mask of 100 bytes: gaps
    assert codec.encode(x)[0] == 0
    x[100] = 1
    assert codec.encode(x)[0] == 1
    assert len(codec.encode(x)) == 1 + 1 + 100 + 101 * 4


@pytest.mark.parametrize("n", [1, 7, 8, 9, 127, 128, 129, 16_384])
@pytest.mark.parametrize("name", [name for name in ALL if "+" in name])
def test_sparse_length_bounds_are_tight(name: str, n: int) -> None:
    codec = codecs.get(name)
    full, none = codec.encode(np.ones(n, np.float32)), codec.encode(np.zeros(n, np.float32))
    assert (len(none), len(full)) == codec.length_bounds(n)


ONE = np.float32(1).tobytes().hex()
HOSTILE = {
    "empty": (16, "", "mode"),
    "only a mode": (16, "00", "mode"),
    "unknown mode": (16, "0200", "mode"),
    "count without end": (16, "00ffffffffffff", "does not end"),
    "count longer than needed": (16, "008000", "more bytes than it needs"),
    "count beyond n": (4, "0005" + "00" * 5 + ONE * 5, "keeps 5 of 4"),
    "values missing": (16, "000203", "positions would have"),
    "bytes left over": (64, "000103" + ONE + "01", "2 positions and says 1|is not finite"),
    "position beyond n": (16, "000110" + ONE, "position 16 of 16"),
    "position far beyond n": (640, "0001" + "ffffffff7f" + ONE, "position 34359738367 of 640"),
    "position without end": (64, "000180" + ONE, "does not end"),
    "position longer than needed": (64, "00018500" + ONE, "more bytes than it needs"),
    "position of six bytes": (640, "0001" + "808080808001" + ONE, "more than 5 bytes"),
    "fewer positions than counted": (640, "0002" + "8101" + ONE * 2, "1 positions and says 2"),
    "zero kept": (16, "000103" + "00000000", "value 0 is zero"),
    "negative zero kept": (16, "000103" + "00000080", "value 0 is zero"),
    "mask beyond n": (12, "0106" + "03f0" + ONE * 6, "beyond its 12"),
    "mask with another count": (8, "0102" + "07" + ONE * 2, "3 bits and the count is 2"),
    "mask too short": (16, "0102" + "03" + ONE * 2, "positions would have 1"),
    "mask where gaps do": (16, "0101" + "0100" + ONE, "gaps are as short"),
    "gaps where a mask does": (8, "0002" + "0000" + ONE * 2, "positions would have 2, not 2 to 1"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_sparse_data(case: str) -> None:
    n, data, message = HOSTILE[case]
    with pytest.raises(PayloadInvalid, match=message):
        codecs.get("sparse+float32").check(memoryview(bytes.fromhex(data)), n)


@given(st.lists(st.integers(0, 2**35 - 1), max_size=200))
def test_varints(numbers: list[int]) -> None:
    given_numbers = np.array(numbers, np.int64)
    data = varint.write(given_numbers)
    plain = b"".join(_leb128(number) for number in numbers)
    read, ends = varint.read(data)
    assert data.tobytes() == plain
    assert read.tolist() == numbers
    assert ends.tolist() == np.cumsum(varint.lengths(given_numbers)).tolist()


def _leb128(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_blocks_keep_nothing_between_them() -> None:
    """A thousand readers side by side, as in a fold of a thousand clients, hold next to nothing."""
    n = 2 * BLOCK_ELEMENTS
    rng = np.random.default_rng(5)
    x = np.where(rng.random(n) < 0.1, 1, 0).astype(np.float32)
    for name in ALL:
        codec = codecs.get(name)
        data = memoryview(codec.encode(x))
        readers = [codec.blocks(data, n) for _ in range(20)]
        tracemalloc.start()
        try:
            for reader in readers:
                next(reader)
            assert tracemalloc.get_traced_memory()[0] < 20 * 4096
        finally:
            tracemalloc.stop()
