"""Tickets of a round: found and counted as by a look at all of them, and without one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RoundsConfig
from fedpeft.rounds.policies import policies
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState
from fedpeft.rounds.transitions import RunState, RunStatus, effects

STATES = st.sampled_from(TicketState)


def made(clients: set[str]) -> Tickets:
    return Tickets(Ticket(f"ticket-{client}", client) for client in sorted(clients))


names = st.sets(st.text(min_size=1, max_size=3), max_size=9)
steps = st.lists(st.tuples(st.integers(0, 8), STATES, st.integers(0, 2)), max_size=12)


@given(names, steps, st.text(max_size=3))
def test_changed_tickets_are_found_and_counted_as_among_any(
    clients: set[str], changes: list[tuple[int, TicketState, int]], wanted: str
) -> None:
    first = tickets = made(clients)
    for place, state, generation in changes if clients else ():
        tickets = tickets.with_changed(replace(tickets[place % len(tickets)], state=state, generation=generation))
        assert not tickets.has_gained(first)
    afresh = Tickets(tuple(tickets))
    assert tickets == afresh and [t.client for t in tickets] == sorted(clients)
    for ticket in afresh:
        assert tickets.find(ticket.id) is ticket and tickets.of_client(ticket.client) is ticket
    assert (tickets.find(f"ticket-{wanted}") is None) == (tickets.of_client(wanted) is None) == (wanted not in clients)
    for state in TicketState:
        assert tickets.number(state) == afresh.number(state) == sum(t.state is state for t in tickets)
        for generation in range(3):
            mine = [t for t in tickets if t.state is state and t.generation == generation]
            assert tickets.number_of_generation(state, generation) == len(mine)
    assert list(tickets.changes_since(first)) == [
        (old, new) for old, new in zip(first, tickets, strict=True) if old != new
    ]
    assert first == made(clients), "tickets are not changed in place"


@given(names, names)
def test_gained_tickets_had_nothing_before(clients: set[str], more: set[str]) -> None:
    before, after = made(clients), made(clients | more)
    assert after.has_gained(before)
    assert [(old, new.client) for old, new in after.changes_since(before)] == [
        (None, c) for c in sorted(more - clients)
    ]


class Unwalked(Tickets):
    """Tickets that nobody may look at one by one."""

    def __iter__(self) -> Iterator[Ticket]:
        raise AssertionError("all tickets are looked at")


def unwalked(tickets: Tickets) -> Unwalked:
    tickets.find("")
    tickets.number(TicketState.ISSUED)
    guarded = Unwalked(tickets)
    guarded.__dict__.update(tickets.__dict__)
    return guarded


def test_no_question_about_one_ticket_looks_at_all() -> None:
    tickets = made({f"client-{i:03}" for i in range(100)})
    received = tickets.with_changed(replace(tickets[7], state=TicketState.RECEIVED))
    before = Round("run-1", 1, Phase.OPEN, unwalked(tickets), 0.0, 600.0)
    after = replace(before, tickets=unwalked(received))
    assert after.ticket("ticket-client-007") is received[7]
    assert after.ticket_of("client-099") is received[99]
    config = RoundsConfig(clients=100)
    assert policies.get("synchronous").wanted(after, config, 0.0) == 0
    first = RunStatus(1, RunState.RUNNING, "", 0, before)
    assert effects(first, replace(first, revision=2, round=after)).issued == ()
