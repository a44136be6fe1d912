"""Those who do not deliver are sampled last for a while; those whose updates are refused each time, last of all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft import seeds
from fedpeft.config import RoundsConfig
from fedpeft.rounds.conduct import ASIDE_AFTER, GOOD, LONGEST_REST, REST_ROUNDS, Conduct, Demerits, settled
from fedpeft.rounds.events import Waiting
from fedpeft.rounds.state_machine import Phase, Round, advance, sample
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState

NAMES = [f"client-{i:02}" for i in range(12)]
EXCLUDED = "UPDATE_EXCLUDED: its norm 3e+38 is more than 30 times 1"


def done(number: int = 5, reasons: dict[str, str] | None = None, **states: TicketState) -> Round:
    tickets = (Ticket(f"ticket-{c}", c, state, (reasons or {}).get(c, "")) for c, state in sorted(states.items()))
    return Round("run-1", number, Phase.COMMITTED, Tickets(tickets))


def after(current: Round, clients: int = 2, **known: Conduct) -> dict[str, Conduct]:
    return settled(current, RoundsConfig(clients=clients, quorum=1), lambda client: known.get(client, GOOD))


class TestSettled:
    def test_who_delivers_is_good_again(self) -> None:
        assert after(done(a=TicketState.RECEIVED), a=Conduct(9, 4, 2)) == {"a": GOOD}

    def test_clients_that_always_delivered_cost_nothing(self) -> None:
        assert after(done(a=TicketState.RECEIVED, b=TicketState.RECEIVED)) == {}

    @pytest.mark.parametrize("state", [TicketState.LATE, TicketState.WITHDRAWN])
    def test_a_ticket_that_brought_nothing(self, state: TicketState) -> None:
        assert after(done(7, a=state, b=TicketState.RECEIVED), a=Conduct(2, 3, 1)) == {"a": Conduct(3, 7, 1)}

    def test_a_refused_update_counts_as_both(self) -> None:
        assert after(done(7, a=TicketState.REFUSED)) == {"a": Conduct(1, 7, 1)}

    def test_a_round_that_did_not_wait_blames_nobody_for_being_late(self) -> None:
        met = done(a=TicketState.RECEIVED, b=TicketState.REFUSED, c=TicketState.LATE, reasons={"b": EXCLUDED})
        assert "c" not in after(met, clients=2)
        assert after(met, clients=3)["c"] == Conduct(1, 5, 0)


class TestDemerit:
    def test_lasts_for_a_while(self) -> None:
        once = Conduct(1, 10)
        assert [once.demerit(n) for n in (11, 10 + REST_ROUNDS, 11 + REST_ROUNDS)] == [1, 1, 0]
        often = Conduct(1000, 10)
        assert [often.demerit(10 + LONGEST_REST), often.demerit(11 + LONGEST_REST)] == [1000, 0]

    def test_of_a_client_set_aside_has_no_end(self) -> None:
        aside, missing = Conduct(3, 10, ASIDE_AFTER), Conduct(10**6, 10)
        assert aside.is_aside and not missing.is_aside
        assert aside.demerit(10**6) > missing.demerit(11)

    def test_only_those_who_have_one_are_named(self) -> None:
        found = Demerits({"a": Conduct(1, 1), "b": Conduct(2, 99)}, 100)
        assert (found, len(found), found.get("a", 0), found.get("c", 0)) == ({"b": 2}, 1, 0, 0)

    def test_only_the_conduct_of_candidates_is_looked_at(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Conduct] = []
        monkeypatch.setattr(Conduct, "demerit", lambda conduct, number: asked.append(conduct) or 1)
        many = {f"client {number}": Conduct(2, number) for number in range(1000)}
        sample(["client 1", "client 7", "another"], 2, 0, 1, Demerits(many, 100))
        assert asked == [many["client 1"], many["client 7"]]


class TestSampling:
    def test_without_demerits_nothing_changes(self) -> None:
        assert sample(NAMES, 5, 3, 7) == sample(NAMES, 5, 3, 7, {})
        assert Waiting(frozenset(NAMES)) == Waiting(frozenset(NAMES), {})

    @given(bad=st.sets(st.sampled_from(NAMES)), count=st.integers(1, 12), seed=st.integers(0, 99))
    def test_nobody_with_a_demerit_before_one_without(self, bad: set[str], count: int, seed: int) -> None:
        taken = sample(NAMES, count, seed, 1, dict.fromkeys(bad, 1))
        assert len(taken) == count
        good = set(NAMES) - bad
        assert len(good & set(taken)) == min(count, len(good))
        rest = sorted(good & set(taken))
        assert rest == sample(good, min(count, len(good)), seed, 1), "and the others as they would be without them"

    def test_a_round_that_cannot_be_held_otherwise_takes_them_all_the_same(self) -> None:
        config = RoundsConfig(clients=2)
        poor = {"a": Conduct(3, 1, ASIDE_AFTER).demerit(2)}
        opened, _ = advance(Round("run-1", 2), Waiting(frozenset("ab"), poor), config, 0.0)
        assert [t.client for t in opened.tickets] == ["a", "b"]
        opened, _ = advance(Round("run-1", 2), Waiting(frozenset("abc"), poor), config, 0.0)
        assert [t.client for t in opened.tickets] == ["b", "c"]


@given(st.sets(st.integers(0, 400), max_size=60), st.integers(0, 60), st.integers(0, 3), st.integers(1, 9))
def test_the_sampled_are_the_first_by_rank_whatever_was_ranked_before(
    some: set[int], count: int, seed: int, number: int
) -> None:
    clients = {f"client-{each}" for each in some}
    ranked = sorted(clients, key=lambda client: (seeds.sampling_rank(seed, number, client), client))
    assert sample(clients, count, seed, number) == sorted(ranked[:count])
