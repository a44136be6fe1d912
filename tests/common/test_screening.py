"""The choice of a round's updates that are folded: the rule by example, and properties for any norms."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.screening import FACTOR, LARGEST_RMS, LEAST, ROUNDS, bound, comparable, median
from fedpeft.spec import AdapterSpec, Role, TensorSpec

VALUES = 100
ABSOLUTE = LARGEST_RMS * math.sqrt(VALUES)
POISON = 3e38 * math.sqrt(VALUES)
ONE = TensorSpec("a", (VALUES,))

norms = st.lists(st.floats(0, 1e300), max_size=12)
sensible = st.floats(1e-3, 1.0)


def limit(received: list[float], past: list[float], factor: float = FACTOR) -> float:
    found = bound(received, past, VALUES, factor)
    assert found is not None
    return found.limit


class TestMedian:
    def test_of_an_even_count_is_the_upper_and_zeros_say_nothing(self) -> None:
        assert median([3.0, 1.0, 0.0, 2.0, 4.0, 0.0]) == 3.0
        assert median([5.0]) == 5.0
        assert median([0.0]) == median([]) == 0.0


class TestBound:
    def test_one_poisoned_update_among_two_in_the_first_round(self) -> None:
        assert 1.0 <= limit([1.0, POISON], []) < POISON

    def test_a_few_norms_give_no_reference(self) -> None:
        assert limit([1.0, 50.0], []) == ABSOLUTE

    @pytest.mark.parametrize("past", [[], [1.0], [1.0] * ROUNDS])
    def test_the_median_of_this_round_and_those_before(self, past: list[float]) -> None:
        assert limit([0.9, 1.0, 1.1, 500.0], past) in (FACTOR, pytest.approx(1.1 * FACTOR))

    def test_a_client_alone_is_held_against_the_past(self) -> None:
        assert limit([500.0], [1.0, 1.0, 1.0]) == FACTOR

    def test_tiny_updates_of_half_of_a_round_do_not_exclude_the_others(self) -> None:
        assert limit([1e-30, 1.0], [1.0, 1.0]) >= 1.0
        assert limit([1e-30, 1e-30, 1.0, 1.0], []) >= 1.0

    def test_honest_clients_may_differ(self) -> None:
        assert limit([0.1, 0.5, 1.0, 2.0, 9.0], []) > 9.0

    def test_no_factor_no_bound(self) -> None:
        assert bound([POISON], [1.0] * 5, VALUES, 0) is None

    def test_the_sentence_says_which_limit(self) -> None:
        found = bound([1.0, 1.0, 1.0, 500.0], [], VALUES, FACTOR)
        assert found is not None
        assert found.against(500.0) == (
            "its norm 500 is more than 30 times 1, the median of this round and those before"
        )
        assert found.against(30.0) == ""
        absolute = bound([POISON], [], VALUES, FACTOR)
        assert absolute is not None
        assert absolute.against(POISON) == "its norm 3e+39 is more than 1e+04, a change of 1000 in every value"

    @given(received=norms, past=norms)
    def test_does_not_depend_on_order(self, received: list[float], past: list[float]) -> None:
        assert bound(received, past, VALUES, FACTOR) == bound(received[::-1], past[::-1], VALUES, FACTOR)

    @given(honest=st.lists(sensible, min_size=2, max_size=8), count=st.integers(1, 7), poison=st.floats(1e4, 1e300))
    def test_what_a_minority_sends_is_excluded_and_excludes_nobody(
        self, honest: list[float], count: int, poison: float
    ) -> None:
        bad = [poison] * min(count, len(honest) - 1)
        found = limit(honest + bad, [])
        assert found < poison or len(honest) + len(bad) < LEAST
        assert all(norm <= found for norm in honest if norm >= max(honest) / FACTOR)

    @given(received=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
    def test_without_a_past_somebody_is_always_left(self, received: list[float]) -> None:
        assert min(received) <= limit(received, [])


class TestComparable:
    def test_the_rounds_before_that_send_the_same_tensors(self) -> None:
        turns = AdapterSpec.of(
            "x",
            [
                TensorSpec("a", (2,), (Role.SENT, Role.FROZEN)),
                TensorSpec("b", (2,), (Role.FROZEN, Role.SENT)),
                TensorSpec("c", (2,)),
            ],
        )
        assert comparable(turns, 7) == [5, 3, 1]
        assert comparable(turns, 2) == []

    def test_only_so_many_and_the_nearest(self) -> None:
        assert comparable(AdapterSpec.of("x", [ONE]), 100) == list(range(99, 99 - ROUNDS, -1))
        assert comparable(AdapterSpec.of("x", [ONE]), 1) == []
