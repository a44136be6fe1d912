"""Traffic, evaluations, and rounds as they are shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import RunNotFound, VersionNotFound
from fedpeft.rounds.events import Waiting
from fedpeft.rounds.state_machine import Phase, Round, advance
from fedpeft_server.store.database import Database
from fedpeft_server.store.evaluations import merged
from fedpeft_server.store.rows import GaugeSnapshot, Place, Result, Traffic

from ..rows import CONFIG, RUN, outcome, shown, version_row, write


class TestFigures:
    def test_traffic_adds_up(self, with_run: Database) -> None:
        two = CONFIG.rounds.model_copy(update={"clients": 2})
        state = advance(Round(RUN, 1), Waiting(frozenset("ab")), two, 1.0)[0]
        write(with_run, state)
        with_run.add_traffic({})
        for _ in range(3):
            with_run.add_traffic(
                {
                    (RUN, 1, "a"): Traffic(1, 2, 3, 2**40),
                    (RUN, 1, "b"): Traffic(5),
                    (RUN, 2, "a"): Traffic(7),
                    ("run-deleted", 1, "a"): Traffic(9),
                }
            )
        (row,) = shown(with_run)
        assert [t.traffic for t in row.tickets] == [Traffic(3, 6, 9, 3 * 2**40), Traffic(15)]
        assert row.traffic == Traffic(18, 6, 9, 3 * 2**40)
        assert Traffic(1, 2, 3, 4) + Traffic(4, 3, 2, 1) == Traffic(5, 5, 5, 5)

    def test_an_evaluation_replaces_the_one_before(self, with_run: Database) -> None:
        for accuracy, at in ((0.25, 1.0), (0.5, 2.0)):
            with_run.put_evaluation(RUN, 0, "judge", "test", {"accuracy": accuracy}, at)
        assert with_run.initial_evaluations([RUN, "another"]) == {RUN: {"accuracy": 0.5}}
        with_run.put_evaluation(RUN, 0, "judge", "validation", {"accuracy": 0.75}, 3.0)
        assert with_run.initial_evaluations([RUN, "another"]) == {RUN: {"accuracy": 0.75}}
        assert with_run.evaluations_by("judge") == ([(RUN, 0)], [])
        assert with_run.evaluations_by("nobody") == ([], [])

    def test_several_evaluators_are_weighed_by_their_examples(self, with_run: Database) -> None:
        with_run.put_evaluation(RUN, 0, "a", "test", {"accuracy": 0.0, "examples": 100.0}, 1.0)
        with_run.put_evaluation(RUN, 0, "b", "test", {"accuracy": 1.0, "examples": 300.0, "loss": 2.0}, 1.0)
        assert with_run.initial_evaluations([RUN, "another"]) == {
            RUN: {"accuracy": 0.75, "examples": 400.0, "loss": 2.0}
        }

    def test_only_versions_that_exist_are_evaluated(self, with_run: Database) -> None:
        with pytest.raises(VersionNotFound):
            with_run.put_evaluation(RUN, 3, "judge", "test", {}, 1.0)
        with pytest.raises(RunNotFound):
            with_run.put_evaluation("run-x", 0, "judge", "test", {}, 1.0)

    @given(
        st.lists(
            st.dictionaries(
                st.sampled_from(["examples", "loss", "accuracy"]), st.floats(0, 1e6, allow_subnormal=False)
            ),
            min_size=1,
        )
    )
    def test_a_mean_lies_between_its_values(self, figures: list[dict[str, float]]) -> None:
        result = merged(figures)
        assert set(result) == {name for f in figures for name in f}
        for name in set(result) - {"examples"}:
            values = [f[name] for f in figures if name in f]
            assert min(values) * (1 - 1e-9) <= result[name] <= max(values) * (1 + 1e-9)


class TestShownRounds:
    NAMES = ("Z", "_", "a", "a-b", "a.b", "b", "ß")

    @pytest.fixture
    def held(self, with_run: Database) -> Database:
        """Three rounds of seven clients whose ids databases like to sort in ways of their own."""
        rounds = CONFIG.rounds.model_copy(update={"clients": 7})
        for number in (1, 2, 3):
            state = advance(Round(RUN, number), Waiting(frozenset(self.NAMES)), rounds, 1.0)[0]
            traffic = {(RUN, number, name): Traffic(number) for name in (*self.NAMES, "stranger")}
            write(with_run, state, traffic=traffic)
        return with_run

    def test_pages_of_any_size_have_every_ticket_once_and_in_order(self, held: Database) -> None:
        for most_rounds in (1, 2, 3, 4):
            for most_tickets in (1, 2, 6, 7, 8, 20, 21, 22):
                place: Place | None = Place()
                seen: list[tuple[int, str]] = []
                numbers: list[int] = []
                while place is not None:
                    rows, place = held.rounds_from(RUN, place, most_rounds, most_tickets, {})
                    assert len(rows) <= most_rounds
                    assert sum(len(row.tickets) for row in rows) <= most_tickets
                    assert {row.traffic for row in rows} <= {Traffic(7), Traffic(14), Traffic(21)}
                    numbers += [row.round.number for row in rows]
                    seen += [(row.round.number, t.ticket.client) for row in rows for t in row.tickets]
                assert seen == [(number, name) for number in (1, 2, 3) for name in sorted(self.NAMES)]
                assert sorted(set(numbers)) == [1, 2, 3]

    def test_bytes_that_are_not_written_yet_are_added_where_their_client_has_a_ticket(self, held: Database) -> None:
        pending = {(2, "a"): Traffic(5, 1), (2, "stranger"): Traffic(100), (9, "a"): Traffic(100)}
        first, second, _ = held.rounds_from(RUN, Place(), 9, 99, pending)[0]
        assert (first.traffic, second.traffic) == (Traffic(7), Traffic(19, 1))
        assert {t.ticket.client: t.traffic for t in second.tickets}["a"] == Traffic(7, 1)

    def test_a_round_with_some_of_its_tickets(self, held: Database) -> None:
        whole = shown(held)[1]
        some = held.round_with(RUN, 2, [t.ticket.id for t in whole.tickets[:2]], {})
        assert some is not None
        assert (some.tickets, some.traffic) == (whole.tickets[:2], whole.traffic)
        assert held.round_with(RUN, 4, [], {}) is None

    def test_what_the_gauges_show(self, held: Database) -> None:
        assert held.gauge_snapshot(RUN, 3) == GaugeSnapshot({}, {}, Traffic(21), Traffic())
        state = replace(shown(held)[1].round, phase=Phase.COMMITTED)
        write(held, state, version=2, result=Result(outcome(train_loss=0.5), 2.0, version_row(2)))
        held.put_evaluation(RUN, 2, "judge", "test", {"accuracy": 0.5}, 2.0)
        held.put_evaluation(RUN, 0, "judge", "test", {"accuracy": 0.1}, 1.0)
        found = held.gauge_snapshot(RUN, 3)
        assert found == GaugeSnapshot({"test": {"accuracy": 0.5}}, {"train_loss": 0.5}, Traffic(21), Traffic(14))
        assert held.gauge_snapshot(RUN, 2).current == Traffic()
