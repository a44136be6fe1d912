"""Coordinate-wise median: the middle of the values, whatever a minority sends."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedpeft.aggregation import BlockStrategy, UpdateFacts, strategy

MEDIAN = strategy("median", {})
blocks = st.integers(1, 7).flatmap(lambda n: arrays(np.float64, (n, 4), elements=st.floats(-1e30, 1e30)))


def reduced(block: np.ndarray) -> np.ndarray:
    assert isinstance(MEDIAN, BlockStrategy)
    return MEDIAN.reduce(block, np.ones(len(block)))


@given(blocks)
def test_it_is_numpys_median_and_leaves_its_argument_alone(block: np.ndarray) -> None:
    before = block.copy()
    np.testing.assert_array_equal(reduced(block), np.median(block, axis=0))
    np.testing.assert_array_equal(block, before)


@given(
    arrays(np.float64, (3, 4), elements=st.floats(-1, 1)), arrays(np.float64, (2, 4), elements=st.floats(-1e30, 1e30))
)
def test_two_of_five_cannot_move_a_value_beyond_those_of_the_others(good: np.ndarray, bad: np.ndarray) -> None:
    found = reduced(np.vstack([bad, good]))
    assert (good.min(axis=0) <= found).all() and (found <= good.max(axis=0)).all()


def test_examples_do_not_count() -> None:
    assert MEDIAN.weigh(UpdateFacts(10**9)) == MEDIAN.weigh(UpdateFacts(1))
