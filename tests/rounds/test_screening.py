"""The choice of a round's updates that are folded: the rule by example, properties for any norms, and attackers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.config import TrainingConfig
from fedpeft.rounds.screening import (
    FACTOR,
    LARGEST_ALLOWANCE,
    LARGEST_RMS,
    LEAST,
    ROUNDS,
    Extent,
    bound,
    comparable,
    local_steps,
    median,
)

VALUES = 100
ABSOLUTE = LARGEST_RMS * math.sqrt(VALUES)
POISON = 3e38 * math.sqrt(VALUES)
ONE = TensorSpec("a", (VALUES,))

norms = st.lists(st.floats(0, 1e300), max_size=12)
sensible = st.floats(1e-3, 1.0)


def equal(values: Iterable[float]) -> list[Extent]:
    """Updates of one local step each."""
    return [Extent(norm, 1.0) for norm in values]


def limit(received: list[float], past: Sequence[float], factor: float = FACTOR) -> float:
    found = bound(equal(received), equal(past), VALUES, factor)
    assert found is not None
    return found.limit


def folded(received: Sequence[Extent], past: Sequence[Extent]) -> list[Extent]:
    """The updates of a round that are not excluded."""
    found = bound(received, past, VALUES, FACTOR)
    assert found is not None
    return [extent for extent in received if not found.against(extent)]


class TestMedian:
    def test_of_an_even_count_is_the_upper_and_zeros_say_nothing(self) -> None:
        assert median(equal([3.0, 1.0, 0.0, 2.0, 4.0, 0.0])) == Extent(3.0, 1.0)
        assert median([Extent(5.0, 7.0)]) == Extent(5.0, 7.0)
        assert median(equal([0.0])) == median([]) == Extent(0.0, 0.0)

    def test_norms_and_steps_have_medians_of_their_own(self) -> None:
        assert median([Extent(1.0, 30.0), Extent(2.0, 10.0), Extent(3.0, 20.0)]) == Extent(2.0, 20.0)


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
        assert bound(equal([POISON]), equal([1.0] * 5), VALUES, 0) is None

    def test_the_sentence_says_which_limit(self) -> None:
        found = bound(equal([1.0, 1.0, 1.0, 500.0]), [], VALUES, FACTOR)
        assert found is not None
        assert found.against(Extent(500.0, 1.0)) == (
            "its norm 500 is more than 30 times 1, the median of this round and those before"
        )
        assert found.against(Extent(30.0, 1.0)) == ""
        assert found.against(Extent(500.0, 4.0)) == (
            "its norm 500 is more than 60 times 1, the median of this round and those before (30 times, times 2 for "
            "its local steps)"
        )

    @pytest.mark.parametrize(("received", "steps"), [([POISON], 1.0), ([100.0] * 3, 16.0)])
    def test_the_sentence_of_the_absolute_limit(self, received: list[float], steps: float) -> None:
        found = bound(equal(received), [], VALUES, FACTOR)
        assert found is not None
        assert found.against(Extent(POISON, steps)) == (
            "its norm 3e+39 is more than 1e+04, a change of 1000 in every value"
        )

    @given(received=norms, past=norms)
    def test_does_not_depend_on_order(self, received: list[float], past: list[float]) -> None:
        first = bound(equal(received), equal(past), VALUES, FACTOR)
        assert first == bound(equal(received[::-1]), equal(past[::-1]), VALUES, FACTOR)

    @given(honest=st.lists(sensible, min_size=2, max_size=8), count=st.integers(1, 7), poison=st.floats(1e4, 1e300))
    def test_what_a_minority_sends_is_excluded_and_excludes_nobody(
        self, honest: list[float], count: int, poison: float
    ) -> None:
        bad = [poison] * min(count, len(honest) - 1)
        found = limit(honest + bad, [])
        assert found < poison or len(honest) + len(bad) < LEAST
        assert all(norm <= found for norm in honest if norm <= min(honest) * FACTOR)

    @given(received=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9))
    def test_without_a_past_somebody_is_always_left(self, received: list[float]) -> None:
        assert min(received) <= limit(received, [])


class TestLocalSteps:
    """With epochs, who has more data makes more steps; measured in docs/benchmarks.md."""

    def test_they_are_what_the_examples_make(self) -> None:
        assert local_steps(10_000, TrainingConfig(batch_size=64)) == 157
        assert local_steps(1, TrainingConfig(epochs=5, batch_size=64)) == 5
        assert local_steps(10**9, TrainingConfig(steps=20)) == local_steps(1, TrainingConfig(steps=20)) == 20

    def test_a_hospital_among_phones_is_folded_and_a_phone_that_changes_as_much_is_not(self) -> None:
        phones, hospital = equal([1.0] * 15), Extent(30.5, 157.0)  # AdamW, one epoch, 8 images and 10,000
        assert hospital in folded([*phones, hospital], [])
        assert folded([hospital], [Extent(1.0, 1.0)] * 3) == [hospital]
        assert folded([*phones, Extent(30.5, 1.0)], []) == phones

    def test_a_phone_among_hospitals_is_folded(self) -> None:
        hospitals, phone = [Extent(30.5, 157.0)] * 5, Extent(1.0, 1.0)
        assert folded([*hospitals, phone], []) == [*hospitals, phone]

    def test_what_claimed_examples_allow_has_an_end(self) -> None:
        honest = equal([1.0] * 9)
        claimed = Extent(FACTOR * LARGEST_ALLOWANCE, 1e9)
        assert claimed in folded([*honest, claimed], [])
        assert folded([*honest, Extent(1.01 * claimed.norm, 1e9)], []) == honest

    @given(st.lists(st.builds(Extent, st.floats(1e-3, 1e3), st.integers(1, 10**6)), min_size=3, max_size=12))
    def test_more_steps_never_allow_less(self, received: list[Extent]) -> None:
        kept = folded(received, [])
        assert all(extent in kept for extent in received if extent.norm <= kept[0].norm / 1e3)
        found = bound(received, [], VALUES, FACTOR)
        assert found is not None
        assert found.allowance(1) == 1 <= found.allowance(found.steps * 4) <= found.allowance(found.steps * 9)


class TestAttackers:
    """Attacks that a norm bound stops, and others that it does not: docs/security.md has the sentence to each."""

    def held(self, rounds: Iterable[list[float]]) -> list[float]:
        """Holds rounds; returns the limit of each."""
        past: list[Extent] = []
        limits = []
        for received in rounds:
            limits.append(limit(received, [extent.norm for extent in past[-ROUNDS:]]))
            past.append(median(folded(equal(received), past[-ROUNDS:])))
        return limits

    def test_one_that_stays_just_below_the_limit_never_moves_it(self) -> None:
        assert set(self.held([1.0] * 9 + [0.999 * FACTOR] for _ in range(200))) == {FACTOR}

    def test_one_that_grows_slowly_never_moves_it(self) -> None:
        assert set(self.held([1.0] * 9 + [1.02**number] for number in range(400))) == {FACTOR}

    @pytest.mark.parametrize(("clients", "first", "later"), [(10, 5, 9), (100, 50, 54)])
    def test_it_takes_half_of_the_first_round_or_more_than_half_with_a_past(
        self, clients: int, first: int, later: int
    ) -> None:
        def raised(colluders: int, past: list[float]) -> bool:
            return limit([1.0] * (clients - colluders) + [10.0] * colluders, past) > FACTOR

        assert raised(first, []) and not raised(first - 1, [])
        assert raised(later, [1.0] * ROUNDS) and not raised(later - 1, [1.0] * ROUNDS)

    @given(
        st.lists(
            st.tuples(st.lists(sensible, min_size=4, max_size=6), st.lists(st.floats(1e-30, 1e30), max_size=3)),
            min_size=1,
            max_size=20,
        )
    )
    def test_a_minority_of_every_round_never_moves_it_beyond_the_honest_clients(
        self, rounds: list[tuple[list[float], list[float]]]
    ) -> None:
        largest = max(max(honest) for honest, _ in rounds)
        assert all(found <= FACTOR * largest for found in self.held(honest + bad for honest, bad in rounds))

    def test_one_that_is_alone_for_rounds_raises_it_thirtyfold_every_four(self) -> None:
        limits, past = [], [1.0] * ROUNDS
        for _ in range(10):
            limits.append(limit([ABSOLUTE], past))
            past = [*past[1:], limits[-1]]
        assert limits == [FACTOR] * 4 + [FACTOR**2] * 4 + [ABSOLUTE] * 2

    def test_zeros_of_a_majority_say_nothing(self) -> None:
        assert limit([0.0] * 7 + [1.0, 1.0, 1.0], []) == FACTOR
        assert limit([0.0] * 10, [0.0] * ROUNDS) == ABSOLUTE

    def test_two_alone_in_the_first_round_have_the_absolute_limit_only(self) -> None:
        assert limit([1.0, ABSOLUTE], []) == ABSOLUTE
        assert folded(equal([1.0, 1.01 * ABSOLUTE]), []) == equal([1.0])


class TestComparable:
    def test_the_rounds_before_that_send_the_same_tensors(self) -> None:
        turns = AdapterSpec.of(
            "x",
            [
                TensorSpec("a", (2,), (TensorRole.SENT, TensorRole.FROZEN)),
                TensorSpec("b", (2,), (TensorRole.FROZEN, TensorRole.SENT)),
                TensorSpec("c", (2,)),
            ],
        )
        assert comparable(turns, 7) == [5, 3, 1]
        assert comparable(turns, 2) == []

    def test_only_so_many_and_the_nearest(self) -> None:
        assert comparable(AdapterSpec.of("x", [ONE]), 100) == list(range(99, 99 - ROUNDS, -1))
        assert comparable(AdapterSpec.of("x", [ONE]), 1) == []
