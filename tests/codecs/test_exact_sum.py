"""Exact sums: equal to fractions, whatever the order and the grouping; their encoding, and their limits."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.codecs import Values
from fedpeft.codecs.sum128 import LARGEST, MOST_ADDED, SUM128, ExactSum, High, Low, TooLarge, as_floats
from fedpeft.errors import PayloadInvalid

UNIT = Fraction(1, 2**64)
FLOATS = st.floats(-(2.0**12), 2.0**12, width=32)
TERMS = st.lists(st.tuples(FLOATS, st.integers(1, 2**20)), min_size=1, max_size=12)


def total(terms: list[tuple[float, int]]) -> ExactSum:
    found = ExactSum(1)
    for value, weight in terms:
        found.add(np.array([value], np.float32), float(weight))
    return found


def as_units(high: High, low: Low) -> list[int]:
    return [int(upper) * 2**64 + int(lower) for upper, lower in zip(high, low, strict=True)]


@given(terms=TERMS)
def test_a_sum_is_that_of_the_products_each_rounded_to_a_unit(terms: list[tuple[float, int]]) -> None:
    expected = sum(round(Fraction(value) * weight / UNIT) for value, weight in terms)
    assert as_units(*total(terms).total()) == [expected]


@given(terms=TERMS, data=st.data())
def test_order_and_grouping_change_nothing(terms: list[tuple[float, int]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(terms))
    ends = sorted({0, len(terms), *data.draw(st.lists(st.integers(0, len(terms)), max_size=4))})
    grouped = ExactSum(1)
    for begin, end in pairwise(ends):
        grouped.add_sum(*total(shuffled[begin:end]).total())
    high, low = total(terms).total()
    assert as_units(*grouped.total()) == as_units(high, low)
    assert grouped.quotient(3.0) == total(terms).quotient(3.0)


@given(terms=TERMS)
def test_a_sum_becomes_the_nearest_float_or_its_neighbour(terms: list[tuple[float, int]]) -> None:
    high, low = total(terms).total()
    exact = as_units(high, low)[0] * UNIT
    for found in (as_floats(high, low), total(terms).quotient(1.0)):
        assert abs(Fraction(float(found[0])) - exact) <= abs(exact) * Fraction(1, 2**52)


def test_many_blocks_and_many_signs() -> None:
    """More values than are added at once, of magnitudes far apart, against fractions; and the encoding's way."""
    rng = np.random.default_rng(3)
    size = 40_000
    updates = [(rng.standard_normal(size) * 10.0 ** rng.integers(-15, 6, size)).astype(np.float32) for _ in range(5)]
    weights = [float(weight) for weight in rng.integers(1, 5000, 5)]
    found = ExactSum(size)
    for update, weight in zip(updates, weights, strict=True):
        found.add(update, weight)
    units = as_units(*found.total())
    for i in rng.integers(0, size, 500):
        terms = zip(updates, weights, strict=True)
        assert units[i] == sum(round(Fraction(float(u[i])) * int(w) / UNIT) for u, w in terms)
    data = memoryview(SUM128.write(*found.total()))
    SUM128.check(data, size)
    read = [as_units(high, low) for _, high, low in SUM128.sums(data, size, 7_001)]
    assert [unit for block in read for unit in block] == units


def test_as_many_as_may_be_are_added_without_a_loss() -> None:
    """The largest products, and halves of a unit, as often as clients can be in a round: no limb overflows."""
    largest = np.nextafter(np.float32(LARGEST), np.float32(0))
    values = np.array([largest, -largest, 1.5 * 2.0**-32, -(2.0**-33)], np.float32)
    once = ExactSum(values.size)
    once.add(values, 1.0)
    for _ in range(17):  # doubling is the same as adding so many times, and quicker
        twice = ExactSum(values.size)
        assert abs(once.total()[0]).max() < 2**52
        twice._limbs[:] = once._limbs
        twice._limbs += once._limbs - ExactSum(values.size)._limbs
        once = twice
    assert MOST_ADDED == 2**17
    expected = [MOST_ADDED * round(Fraction(float(value)) / UNIT) for value in values]
    assert as_units(*once.total()) == expected


@pytest.mark.parametrize("value", [LARGEST, -LARGEST, 3e38])
def test_what_is_too_large_is_named_and_not_added(value: float) -> None:
    found = ExactSum(3)
    with pytest.raises(TooLarge) as caught:
        found.add(np.array([1, value, 2], np.float32), 1.0)
    assert caught.value.position == 1
    assert as_units(*found.total()) == [0, 0, 0]


def test_no_values_are_a_sum_too() -> None:
    found = ExactSum(0)
    found.add(np.zeros(0, np.float32), 5.0)
    assert SUM128.write(*found.total()) == b""


def test_sums_beyond_the_bound_are_not_written_and_not_taken() -> None:
    high, low = np.array([int(LARGEST)]), np.zeros(1, np.uint64)
    with pytest.raises(OverflowError):
        SUM128.write(high, low)
    data = np.array([(0, int(LARGEST))], [("low", "<u8"), ("high", "<i8")]).tobytes()
    with pytest.raises(PayloadInvalid, match=r"sum 0 is 8589934592; sums below 2\^33 are taken"):
        SUM128.check(memoryview(data), 1)
    with pytest.raises(PayloadInvalid, match="take 32 bytes, not 16"):
        SUM128.check(memoryview(data), 2)


@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=20))
def test_float32_becomes_the_sum_of_one_update(values: list[float]) -> None:
    x: Values = np.array(values, np.float32)
    data = memoryview(SUM128.encode(x))
    small = np.abs(x) < LARGEST
    np.testing.assert_allclose(SUM128.decode(data, x.size)[small], x[small], rtol=0, atol=float(UNIT))
