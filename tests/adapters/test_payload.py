"""Payloads: manifests held against the spec, bytes held against the manifest."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.payload import (
    CHUNK_BYTES,
    FAST_S,
    FIRST_CHUNK_BYTES,
    Entry,
    Manifest,
    chunks,
)
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.codecs import BLOCK_ELEMENTS, codecs
from fedpeft.errors import ManifestInvalid, PayloadInvalid

SPECS = (TensorSpec("a", (2, 3)), TensorSpec("b", ()), TensorSpec("c.bias", (5,)))
ENCODINGS = ["float32", "float16", "bfloat16", "sparse+float32", "sparse+float16", "sparse+bfloat16"]


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.integers(-3, 4, spec.shape).astype(np.float32) for spec in SPECS}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_round_trip(encoding: str) -> None:
    given_tensors = tensors()
    manifest, data = payload.encode(given_tensors, SPECS, encoding)
    payload.check_manifest(manifest, SPECS, [encoding])
    payload.check_payload(manifest, memoryview(data))
    decoded = payload.decode(manifest, memoryview(data))
    assert list(decoded) == ["a", "b", "c.bias"]
    for spec in SPECS:
        assert decoded[spec.name].shape == spec.shape
        np.testing.assert_array_equal(decoded[spec.name], given_tensors[spec.name])
    assert manifest.payload_bytes == len(data)
    assert manifest.sha256 == hashlib.sha256(data).digest()


def test_a_payload_written_to_a_stream_is_the_same() -> None:
    stream = io.BytesIO()
    manifest = payload.write(stream, tensors(), SPECS, "sparse+float16")
    assert (manifest, stream.getvalue()) == payload.encode(tensors(), SPECS, "sparse+float16")


def test_float32_takes_four_bytes_a_value() -> None:
    assert payload.encode(tensors(), SPECS, "float32")[0].payload_bytes == 4 * 12


def test_tensors_must_fit_their_specs() -> None:
    wrong = {**tensors(), "a": np.zeros((3, 2), np.float32)}
    with pytest.raises(ManifestInvalid, match=r"tensor a has shape \(3, 2\); the spec says \(2, 3\)"):
        payload.encode(wrong, SPECS, "float32")
    with pytest.raises(ManifestInvalid, match="tensor b is missing"):
        payload.encode({"a": wrong["a"].T}, SPECS, "float32")


def changed(index: int, **changes: object) -> Manifest:
    manifest, _ = payload.encode(tensors(), SPECS, "float32")
    entries = list(manifest.entries)
    entries[index] = replace(entries[index], **changes)
    return replace(manifest, entries=tuple(entries))


def test_faults_of_a_manifest() -> None:
    good, _ = payload.encode(tensors(), SPECS, "float32")
    a, b, c = good.entries
    faults = {
        "tensor b is missing": replace(good, entries=(a, c)),
        "tensor d is not one that is sent": replace(good, entries=(a, b, c, replace(c, name="d"))),
        "order, each once": replace(good, entries=(b, a, c)),
        "each once": replace(good, entries=(a, a, b, c)),
        r"shape \(3, 2\); the spec says \(2, 3\)": changed(0, shape=(3, 2)),
        "encoded as 'float64'; this run takes float32": changed(1, encoding="float64"),
        "begins at byte 25, not at 24": changed(1, offset=25),
        "has 19 bytes; float32 has 20": changed(2, length=19),
        "payload_bytes is 9, the entries have 48": replace(good, payload_bytes=9),
    }
    for message, manifest in faults.items():
        with pytest.raises(ManifestInvalid, match=message):
            payload.check_manifest(manifest, SPECS, ["float32"])


def test_lengths_of_sparse_tensors_are_bounded() -> None:
    entry = Entry("a", (2, 3), "sparse+float32", 0, 10**15)
    with pytest.raises(ManifestInvalid, match="sparse\\+float32 has 2 to 27"):
        payload.check_manifest(Manifest((entry,), 10**15, b""), SPECS[:1], ["sparse+float32"])


def test_a_bad_value_is_named_with_its_tensor() -> None:
    bad = tensors()
    bad["c.bias"][3] = np.nan
    manifest, data = payload.encode(bad, SPECS, "float32")
    with pytest.raises(PayloadInvalid, match=r"tensor c\.bias: value 3 is not finite"):
        payload.check_payload(manifest, memoryview(data))


@pytest.mark.parametrize("length", [0, 47, 49])
def test_a_payload_of_another_length(length: int) -> None:
    manifest, data = payload.encode(tensors(), SPECS, "float32")
    with pytest.raises(PayloadInvalid, match=f"has {length} bytes; its manifest says 48"):
        payload.check_payload(manifest, memoryview((data + b"\0")[:length]))


@given(place=st.integers(0, 200), flip=st.integers(1, 255), encoding=st.sampled_from(ENCODINGS))
def test_damaged_payloads_decode_to_finite_values_or_are_refused(place: int, flip: int, encoding: str) -> None:
    manifest, data = payload.encode(tensors(), SPECS, encoding)
    damaged = bytearray(data)
    damaged[place % len(damaged)] ^= flip
    try:
        payload.check_payload(manifest, memoryview(damaged))
    except PayloadInvalid:
        return
    assert all(np.isfinite(a).all() for a in payload.decode(manifest, memoryview(damaged)).values())


@given(place=st.integers(0, 200), flip=st.integers(1, 255), encoding=st.sampled_from(ENCODINGS))
def test_a_payload_is_refused_in_the_same_words_where_its_norm_is_taken_too(
    place: int, flip: int, encoding: str
) -> None:
    manifest, data = payload.encode(tensors(), SPECS, encoding)
    damaged = bytearray(data)
    damaged[place % len(damaged)] ^= flip
    try:
        payload.check_payload(manifest, memoryview(damaged))
    except PayloadInvalid as error:
        with pytest.raises(PayloadInvalid) as refused:
            payload.checked_squared_norm(manifest, memoryview(damaged))
        assert (refused.value.message, refused.value.fields) == (error.message, error.fields)
    else:
        expected = payload.squared_norm(manifest, memoryview(damaged))
        assert payload.checked_squared_norm(manifest, memoryview(damaged)) == expected


@pytest.mark.parametrize("bits", [0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0x7F80_0001, 0xFFFF_FFFF])
@pytest.mark.parametrize("place", [0, BLOCK_ELEMENTS + 1, 3 * BLOCK_ELEMENTS - 1])
def test_no_value_that_is_not_finite_passes_with_a_norm(bits: int, place: int) -> None:
    manifest, data = mixed([2 * BLOCK_ELEMENTS, BLOCK_ELEMENTS], ["float32"] * 2)
    values = np.frombuffer(data, "<u4").copy()
    values[place] = bits
    with pytest.raises(PayloadInvalid, match="is not finite"):
        payload.checked_squared_norm(manifest, memoryview(values.tobytes()))


def test_the_largest_values_have_a_norm() -> None:
    manifest, _ = mixed([2 * BLOCK_ELEMENTS], ["float32"])
    largest = np.full(2 * BLOCK_ELEMENTS, np.finfo(np.float32).max)
    expected = float(np.finfo(np.float32).max) ** 2 * largest.size
    assert payload.checked_squared_norm(manifest, memoryview(largest.tobytes())) == pytest.approx(expected)


def mixed(sizes: list[int], encodings: list[str]) -> tuple[Manifest, bytes]:
    """A payload of tensors of these sizes, each in its own encoding."""
    rng, entries, data = np.random.default_rng(0), list[Entry](), b""
    for i, (size, encoding) in enumerate(zip(sizes, encodings, strict=True)):
        part = codecs.get(encoding).encode(rng.standard_normal(size, np.float32))
        entries.append(Entry(f"t{i}", (size,), encoding, len(data), len(part)))
        data += part
    return Manifest(tuple(entries), len(data), hashlib.sha256(data).digest()), data


SIZES = st.lists(
    st.sampled_from([1, 3, 200, 2400, BLOCK_ELEMENTS - 3, BLOCK_ELEMENTS, 2 * BLOCK_ELEMENTS + 1]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40)
@given(sizes=SIZES, given_data=st.data())
def test_neighbours_read_together_are_read_as_each_alone(sizes: list[int], given_data: st.DataObject) -> None:
    encodings = [given_data.draw(st.sampled_from(["float32", "bfloat16", "sparse+float32"])) for _ in sizes]
    manifest, data = mixed(sizes, encodings)
    payload.check_payload(manifest, memoryview(data))
    norm = 0.0
    for entry, part in payload.parts(manifest, memoryview(data)):
        for _, values in codecs.get(entry.encoding).blocks(part, entry.shape[0]):
            norm += float((values.astype(np.float64) ** 2).sum())
    assert payload.squared_norm(manifest, memoryview(data)) == norm  # to the last bit: records name it
    assert payload.checked_squared_norm(manifest, memoryview(data)) == norm


def test_of_neighbours_read_together_the_wrong_one_is_named() -> None:
    manifest, data = mixed([200, 300, 400], ["float32"] * 3)
    values = np.frombuffer(data, "<f4").copy()
    values[200 + 17] = np.inf
    with pytest.raises(PayloadInvalid, match=r"tensor t1: value 17 is not finite") as caught:
        payload.check_payload(manifest, memoryview(values.tobytes()))
    assert caught.value.fields == (("tensors[1]", "value 17 is not finite"),)


@given(st.integers(0, 2**32), st.integers(0, 2**24))
def test_chunks_cover_a_transfer_once_and_begin_small(offset: int, length: int) -> None:
    pieces = list(chunks(offset, offset + length))
    assert [begin for begin, _ in pieces] == list(accumulate([offset, *(size for _, size in pieces)]))[: len(pieces)]
    assert sum(size for _, size in pieces) == length
    assert all(1 <= size <= min(FIRST_CHUNK_BYTES << number, CHUNK_BYTES) for number, (_, size) in enumerate(pieces))


class Line:
    """A line, and the clock beside it."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.sizes: list[int] = []

    def send(self, length: int, seconds: Callable[[int], float]) -> None:
        """Sends so many bytes, each chunk in as many seconds as are said of its size."""
        for _, size in chunks(0, length, lambda: self.clock):
            self.sizes.append(size)
            self.clock += seconds(size)


@given(st.floats(10, 1e9), st.integers(1, 64 * 2**20))
def test_no_chunk_takes_nearly_as_long_as_a_transfer_may_stand_still(bytes_per_s: float, length: int) -> None:
    line = Line()
    line.send(length, lambda size: size / bytes_per_s)
    largest = max(size for size in line.sizes)
    assert largest <= max(2 * FAST_S * bytes_per_s, FIRST_CHUNK_BYTES)


def test_chunks_follow_the_pace_of_the_line() -> None:
    took, line = iter([1, 3, 16, 16, 16, 16, 16, 3, 1, 1]), Line()
    line.send((64 + 128 + 128 + 64 + 32 + 16 + 8 + 8 + 8 + 16) * 1024, lambda size: next(took))
    assert [size // 1024 for size in line.sizes] == [64, 128, 128, 64, 32, 16, 8, 8, 8, 16]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 255),
    offset=st.integers(0, 80),
    length=st.integers(0, 80),
)
def test_a_selection_is_the_bytes_of_its_tensors(lengths: list[int], seed: int, offset: int, length: int) -> None:
    data, starts = bytes(range(sum(lengths))), [0, *accumulate(lengths)]
    entries = tuple(Entry(str(i), (n,), "float32", starts[i], n) for i, n in enumerate(lengths))
    chosen = [i for i in range(len(lengths)) if seed >> i & 1]
    selection = payload.Selection.of(Manifest(entries, len(data), b""), chosen)
    stream = b"".join(data[starts[i] : starts[i + 1]] for i in chosen)
    assert selection.size_bytes == len(stream)
    pieces = list(selection.pieces(offset, length))
    assert b"".join(data[at : at + n] for at, n in pieces) == stream[offset : offset + length]
    assert all(n > 0 for _, n in pieces), "no read of nothing"
    ends = [at + n for at, n in pieces]
    assert all(end != at for end, (at, _) in zip(ends, pieces[1:], strict=False)), "neighbours are read as one"


def test_what_is_missing_is_what_rounds_changed() -> None:
    turns = (TensorRole.SENT, TensorRole.FROZEN)
    fixed, local = TensorSpec("c", (1,), (TensorRole.FROZEN,)), TensorSpec("d", (1,), (TensorRole.LOCAL,))
    spec = AdapterSpec("m", (TensorSpec("a", (1,), turns), TensorSpec("b", (1,), turns[::-1]), fixed, local))
    manifest, _ = payload.encode({n: np.zeros(1, np.float32) for n in "abc"}, spec.shared, "float32")
    found = {
        (have, version): payload.missing(manifest, spec, version, have) for have in range(4) for version in range(4)
    }
    assert found[0, 1] == found[1, 0] == found[2, 3] == (0,)
    assert found[1, 2] == (1,)
    assert found[0, 2] == found[1, 3] == found[3, 0] == (0, 1)
    assert found[2, 2] == payload.missing(manifest, spec, 3, None) == (0, 1, 2), "all, where nothing can have changed"
    assert payload.missing(manifest, spec, 2**32 - 1, 0) == (0, 1), "in no time"
    assert spec.parameters == 3 and spec.largest_update == 1
