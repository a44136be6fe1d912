"""EDEN: the rotation, the scale, the quantiser."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpeft.codecs import BLOCK_ELEMENTS, Values, codecs
from fedpeft.codecs.eden import CENTROIDS
from fedpeft.codecs.rotation import column_sums, hadamard, signs
from fedpeft.errors import PayloadInvalid

from .round_trip import through

NAMES = ["eden1", "eden2", "eden3", "eden4"]
ERRORS = {"eden1": 0.571, "eden2": 0.133, "eden3": 0.0358, "eden4": 0.0096}

tensors = arrays(
    np.float32, st.integers(1, 1400), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False), fill=st.just(0.25)
)
each_codec = pytest.mark.parametrize("name", NAMES)


@pytest.mark.parametrize("size", [1, 8, 64, 1024])
def test_hadamard_twice_is_the_identity(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((size, 3))
    np.testing.assert_allclose(hadamard(hadamard(x)) / size, x, rtol=1e-12, atol=1e-14)
    matrix = hadamard(np.eye(size))
    for i, j in ((0, size - 1), (size // 2, size // 3), (size - 1, size - 1)):
        assert matrix[i, j] == (-1) ** (i & j).bit_count()


def test_sums_and_signs() -> None:
    x = np.random.default_rng(0).standard_normal((16, 3))
    np.testing.assert_allclose(column_sums(x), x.sum(axis=0), rtol=1e-12)
    drawn = signs(7, 3, 2, 1024)
    assert set(np.unique(drawn)) == {-1.0, 1.0} and np.abs(drawn.mean(axis=0)).max() < 0.15
    np.testing.assert_array_equal(drawn[:, 1:], signs(7, 4, 1, 1024))


@pytest.mark.parametrize("bits", CENTROIDS)
def test_the_centroids_are_those_of_lloyd_and_max(bits: int) -> None:
    density = lambda z: math.exp(-z * z / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    mass = lambda z: math.erf(z / math.sqrt(2)) / 2  # noqa: E731
    positive = CENTROIDS[bits]
    borders = [0.0, *((a + b) / 2 for a, b in pairwise(positive)), 40.0]
    for centroid, low, high in zip(positive, borders[:-1], borders[1:], strict=True):
        mean = (density(low) - density(high)) / (mass(high) - mass(low))
        assert centroid == pytest.approx(mean, abs=3e-4)


@each_codec
@given(x=tensors, seed=st.integers(0, 2**63 - 1))
def test_the_product_with_the_values_is_their_square(name: str, x: Values, seed: int) -> None:
    decoded = through(codecs.get(name).seeded(seed), x).astype(np.float64)
    square = float(np.square(x.astype(np.float64)).sum())
    assert float((decoded * x).sum()) == pytest.approx(square, rel=1e-5, abs=1e-30)


@each_codec
def test_the_error_is_that_of_the_quantiser(name: str) -> None:
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(40_000) * np.exp(rng.standard_normal(40_000))).astype(np.float32)
    error = through(codecs.get(name), x).astype(np.float64) - x
    share = np.square(error).sum() / np.square(x.astype(np.float64)).sum()
    assert share == pytest.approx(ERRORS[name], rel=0.06), "whatever the values' distribution is"


@each_codec
def test_the_mean_of_many_rotations_is_the_value(name: str) -> None:
    draws = 800
    x = np.random.default_rng(3).standard_normal(192).astype(np.float32)
    found = np.array([through(codecs.get(name).seeded(seed), x) for seed in range(draws)], np.float64)
    z = (found.mean(axis=0) - x) / (found.std(axis=0) / np.sqrt(draws))
    assert np.abs(z).max() < 5 and np.square(z).mean() < 1.6


@each_codec
def test_a_tensor_of_many_pieces(name: str) -> None:
    x = np.random.default_rng(4).standard_normal(2 * BLOCK_ELEMENTS + 1100).astype(np.float32)
    decoded = through(codecs.get(name), x)
    assert np.square(decoded - x).mean() == pytest.approx(ERRORS[name], rel=0.05)


@each_codec
def test_error_feedback_keeps_a_bounded_residual(name: str) -> None:
    """Of changes that always are the same, all but a bounded part arrives."""
    x, residual = np.random.default_rng(5).standard_normal(500).astype(np.float32), np.zeros(500, np.float32)
    norms = []
    for seed in range(60):
        target = x + residual
        residual = target - through(codecs.get(name).seeded(seed), target)
        norms.append(float(np.linalg.norm(residual) / np.linalg.norm(x)))
    assert max(norms[30:]) < 4 and max(norms[30:]) < 1.5 * max(norms[:30])


@each_codec
def test_hostile_bytes(name: str) -> None:
    codec, one = codecs.get(name), codecs.get(name).encode(np.ones(3, np.float32))
    for scale, shown in (("0000807f", "inf"), ("0000c07f", "nan"), ("000080bf", "-1")):
        with pytest.raises(PayloadInvalid, match=f"scale 0 is {shown}"):
            codec.check(memoryview(one[:4] + bytes.fromhex(scale) + one[8:]), 3)
    largest = one[:4] + bytes.fromhex("ffff7f7f") + one[8:]
    codec.check(memoryview(largest), 3)
    assert np.isfinite(codec.decode(memoryview(largest), 3)).all()
