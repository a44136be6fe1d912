"""Stochastic uniform quantisation: unbiased, an error below one step, and the same bytes of the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs, packing, scales
from fedpeft.config import CodecConfig, parse_config
from fedpeft.errors import ConfigInvalid, PayloadInvalid

from .round_trip import TENSORS, through

NAMES = ["uniform2", "uniform4", "uniform8"]
RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "bias"}}

each_codec = pytest.mark.parametrize("name", NAMES)


@each_codec
@given(x=TENSORS, seed=st.integers(0, 2**63 - 1))
def test_the_error_is_below_one_step(name: str, x: Values, seed: int) -> None:
    codec = codecs.get(name).seeded(seed)
    data = codec.encode(x)
    step = scales.spread(np.frombuffer(data[: 4 * scales.count(x.size)], np.float32), 0, x.size).astype(np.float64)
    assert (np.abs(through(codec, x).astype(np.float64) - x) < step).all()


@each_codec
def test_the_mean_of_many_draws_is_the_value(name: str) -> None:
    draws = 4_000
    x = np.random.default_rng(3).standard_normal(40).astype(np.float32)
    found = np.array([through(codecs.get(name).seeded(seed), x) for seed in range(draws)], np.float64)
    deviation = np.maximum(found.std(axis=0), np.abs(found).max() / 1000)  # of the largest, a draw in 10^5 differs
    z = (found.mean(axis=0) - x) / (deviation / np.sqrt(draws))
    assert np.abs(z).max() < 4.5, "40 values: one in 4,000 tests would go beyond"
    assert abs(z.mean()) < 4 / np.sqrt(40)


@each_codec
def test_each_piece_draws_anew(name: str) -> None:
    x = np.random.default_rng(1).standard_normal(BLOCK_ELEMENTS + 300).astype(np.float32)
    codec = codecs.get(name)
    first, second = codec.seeded(5).encode(x[:300]), codec.seeded(5).encode(x[BLOCK_ELEMENTS:])
    assert first != second
    with_same_values = np.concatenate([x[:300], np.zeros(BLOCK_ELEMENTS - 300), x[:300]]).astype(np.float32)
    decoded = through(codec.seeded(5), with_same_values)
    assert not np.array_equal(decoded[:300], decoded[BLOCK_ELEMENTS:]), "each piece draws anew"


@each_codec
def test_zeros_and_the_ends_of_float32(name: str) -> None:
    largest = np.finfo(np.float32).max
    x = np.array([largest, -largest, *[0.0] * 126, *[0.0] * 128, 1e-45, -1e-45], np.float32)
    decoded = through(codecs.get(name), x)
    assert np.isfinite(decoded).all() and not decoded[2:256].any()
    np.testing.assert_allclose(decoded[:2], x[:2], rtol=1 / 32)


@each_codec
def test_hostile_bytes(name: str) -> None:
    codec, one = codecs.get(name), codecs.get(name).encode(np.ones(3, np.float32))
    cases = {
        "take": one + b"\0",
        "scale 0 is inf": b"\x00\x00\x80\x7f" + one[4:],
        "scale 0 is nan": b"\x00\x00\xc0\x7f" + one[4:],
        "scale 0 is -1": b"\x00\x00\x80\xbf" + one[4:],
        "scale 0 is 0": bytes(4) + one[4:],
        r"code \d is|beyond": one[:4] + b"\xff" * (len(one) - 4),
    }
    for message, data in cases.items():
        with pytest.raises(PayloadInvalid, match=message):
            codec.check(memoryview(data), 3)


@given(codes=st.lists(st.integers(0, 255), min_size=1, max_size=70), bits=st.integers(1, 8), data=st.data())
def test_packing(codes: list[int], bits: int, data: st.DataObject) -> None:
    given_codes = np.array(codes) % (1 << bits)
    raw = packing.pack(given_codes.astype(np.uint8), bits)
    number = sum(int(code) << (i * bits) for i, code in enumerate(given_codes))
    assert raw.tobytes() == number.to_bytes(packing.packed_bytes(len(codes), bits), "little")
    start = data.draw(st.integers(0, len(codes) - 1))
    stop = data.draw(st.integers(start + 1, len(codes)))
    assert packing.unpack(raw, bits, start, stop).tolist() == given_codes[start:stop].tolist()


def test_error_feedback_of_a_codec_that_would_add_it_up_is_refused_by_field() -> None:
    for name in ("uniform4", "uniform8"):
        assert CodecConfig(up=name).error_feedback
    assert CodecConfig(up="uniform2", error_feedback=False).encoding == "uniform2"
    with pytest.raises(ConfigInvalid, match=r"codec.error_feedback: must be false with uniform2"):
        parse_config({**RUN, "codec": {"up": "uniform2"}})


@each_codec
def test_versions_and_kept_values_go_in_another_encoding(name: str) -> None:
    with pytest.raises(ConfigInvalid, match=rf"codec.down: '{name}' rounds at random"):
        parse_config({**RUN, "codec": {"down": name}})
    with pytest.raises(ConfigInvalid, match=rf"codec.values: there is no encoding '{name}' of kept values"):
        parse_config({**RUN, "codec": {"up": "sparse", "values": name}})
