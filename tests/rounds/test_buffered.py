"""Buffered rounds: a number of clients always trains, and tickets outlive the round that they were issued in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RoundsConfig, parse_config
from fedpeft.errors import ConfigInvalid, RoundClosed, VersionBeingMade
from fedpeft.rounds import conduct
from fedpeft.rounds.events import (
    Aggregated,
    Excluded,
    Paused,
    Received,
    Refused,
    Resumed,
    RolledBack,
    TimePassed,
    Waiting,
    Withdrawn,
)
from fedpeft.rounds.state_machine import Phase, Round, advance
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState
from fedpeft.rounds.transitions import Changes, RunState, RunStatus, in_progress, transition

from .test_state_machine import NAMES, RUN, after

EVERYBODY = Waiting(frozenset(NAMES))
CONFIG = RoundsConfig(policy="buffered", clients=2, concurrency=5, max_staleness=2, min_available=1)


def begun(config: RoundsConfig = CONFIG) -> Round:
    return after(Round(RUN, 1), config, EVERYBODY)


def folded(state: Round, config: RoundsConfig = CONFIG) -> Round:
    """Returns the next round, open, after the first updates of those who work."""
    at_work = state.in_state(TicketState.ISSUED)[: config.clients - len(state.in_state(TicketState.RECEIVED))]
    done = after(state, config, *(Received(ticket.id) for ticket in at_work), Aggregated())
    assert done.phase is Phase.COMMITTED
    return after(done.following(config, 0.0), config, EVERYBODY)


def test_those_at_work_stay_at_work_and_others_take_the_free_places() -> None:
    first = begun()
    assert len(first.in_state(TicketState.ISSUED)) == 5
    second = folded(first)
    kept = {ticket.id for ticket in first.tickets[2:]}
    assert (second.number, second.phase) == (2, Phase.OPEN)
    assert kept < {ticket.id for ticket in second.in_state(TicketState.ISSUED)}
    assert [(t.base_version, second.staleness(t)) for t in second.tickets if t.id in kept] == [(0, 1)] * 3
    assert [(t.base_version, second.staleness(t)) for t in second.tickets if t.id not in kept] == [(1, 0)] * 2


def test_a_place_that_becomes_free_is_given_away_while_the_round_is_open() -> None:
    state = begun()
    state = after(state, CONFIG, Received(state.tickets[0].id), EVERYBODY)
    assert len(state.in_state(TicketState.ISSUED)) == 5
    assert len(state.in_state(TicketState.RECEIVED)) == 1


def test_an_update_too_many_versions_behind_is_late() -> None:
    state = begun()
    slow = state.tickets[-1]
    for _ in range(2):
        state = folded(state)
        assert state.ticket(slow.id).state is TicketState.ISSUED
    others = [ticket for ticket in state.in_state(TicketState.ISSUED) if ticket != slow]
    done = after(state, CONFIG, *(Received(ticket.id) for ticket in others[:2]))
    assert done.phase is Phase.AGGREGATING
    assert done.ticket(slow.id).state is TicketState.LATE
    with pytest.raises(RoundClosed):
        advance(done, Received(slow.id), CONFIG, 0.0)


def test_a_client_counts_once_a_version() -> None:
    config = CONFIG.model_copy(update={"clients": 12, "concurrency": 12, "quorum": 1})
    state = begun(config)
    state = after(state, config, Received(state.tickets[0].id), EVERYBODY)
    assert sorted(ticket.client for ticket in state.tickets) == NAMES


def test_clients_still_at_work_did_not_miss_their_ticket() -> None:
    state = begun()
    done = after(state, CONFIG, *(Received(t.id) for t in state.tickets[:2]), Aggregated())
    assert conduct.settled(done, CONFIG, lambda client: conduct.GOOD) == {}


def test_tickets_of_synchronous_rounds_end_with_them() -> None:
    config = RoundsConfig(clients=2, over_selection=1.0)
    state = after(Round(RUN, 1), config, EVERYBODY)
    done = after(state, config, *(Received(t.id) for t in state.tickets[:2]), Aggregated())
    assert done.following(config, 0.0) == Round(RUN, 2)


def test_the_place_of_a_client_of_which_nothing_comes_is_given_away_after_a_deadline() -> None:
    first = begun()
    assert after(first, CONFIG, EVERYBODY, now=1600.9) is first
    later = after(first, CONFIG, EVERYBODY, now=1601.0)
    assert len(later.in_state(TicketState.ISSUED)) == 10
    silent = first.tickets[0]
    counted = after(later, CONFIG, Received(silent.id), now=1602.0)
    assert counted.ticket(silent.id).state is TicketState.RECEIVED, "its ticket is as good as the others"


def test_an_update_that_comes_while_a_version_is_made_counts_in_the_next_one() -> None:
    state = begun()
    folding = after(state, CONFIG, *(Received(ticket.id) for ticket in state.tickets[:2]))
    assert folding.phase is Phase.AGGREGATING
    third = folding.tickets[2]
    with pytest.raises(VersionBeingMade, match="version 1 of run-000000000001 is being made; the update counts in the"):
        advance(folding, Received(third.id), CONFIG, 0.0)
    second = after(folding, CONFIG, Aggregated()).following(CONFIG, 2000.0)
    assert (second.phase, second.opened_at, second.deadline) == (Phase.OPEN, 2000.0, 2600.0)
    second = after(second, CONFIG, Received(third.id))
    assert (second.ticket(third.id).state, second.staleness(third)) == (TicketState.RECEIVED, 1)


def test_a_round_after_the_first_opens_for_whoever_is_free() -> None:
    config = CONFIG.model_copy(update={"concurrency": 2, "min_available": None})
    assert begun(config).phase is Phase.OPEN
    alone = Waiting(frozenset(NAMES[:1]))
    assert after(Round(RUN, 1), config, alone).phase is Phase.WAITING
    assert after(Round(RUN, 2), config, alone).in_state(TicketState.ISSUED)[0].client == NAMES[0]


def test_the_last_version_leaves_no_ticket() -> None:
    config = CONFIG.model_copy(update={"count": 1})
    state = begun(config)
    done = after(state, config, *(Received(t.id) for t in state.tickets[:2]), Aggregated())
    assert {t.state for t in done.tickets} == {TicketState.RECEIVED, TicketState.LATE}


def test_a_client_that_gave_a_ticket_of_an_earlier_round_back_gets_another_after_an_extension() -> None:
    config = CONFIG.model_copy(update={"concurrency": 3})
    three = Waiting(frozenset(NAMES[:3]))
    first = after(Round(RUN, 1), config, three)
    second = after(first, config, *(Received(t.id) for t in first.tickets[:2]), Aggregated()).following(config, 1001.0)
    (old,) = second.tickets
    given_back = after(second, config, Withdrawn(old.id, "its disk is full"), TimePassed(), now=1601.0)
    status = RunStatus(4, RunState.RUNNING, "", 1, given_back)
    made = transition(status, [three], config, 1602.0)
    assert made is not None
    assert made.replaced == (given_back.ticket(old.id),)
    (new,) = [ticket for ticket in made.after.round.tickets if ticket.client == old.client]
    assert (new.id != old.id, new.base_version, new.state) == (True, 1, TicketState.ISSUED)


class Table:
    """The rows that transitions write, and the run that a server reads from them."""

    def __init__(self, status: RunStatus) -> None:
        self.status = status
        self.rounds: dict[int, Round] = {}
        self.tickets: dict[str, tuple[int, Ticket]] = {}

    def write(self, changes: Changes) -> None:
        written = [changes.round] if changes.writes_round else []
        rows = [(changes.round.number, ticket) for ticket in changes.tickets]
        if changes.begun:
            written.append(changes.begun)
            rows += [(changes.begun.number, ticket) for ticket in changes.begun.tickets]
        rows += [(old.issued_in, old) for old in changes.replaced]
        self.rounds |= {state.number: state.without_tickets for state in written}
        self.tickets |= {ticket.id: (number, ticket) for number, ticket in rows}
        self.status = changes.after

    def read(self, now: float) -> Round:
        if not self.rounds:
            return Round(RUN, 1)
        newest = self.rounds[max(self.rounds)]
        mine = sorted((t for number, t in self.tickets.values() if number == newest.number), key=lambda t: t.client)
        found = replace(newest, tickets=Tickets(mine))
        return in_progress(found, self.status.version, CONFIG, now, active=self.status.is_active)

    def check(self, now: float) -> None:
        assert self.read(now) == self.status.round
        places = [(number, ticket.client) for number, ticket in self.tickets.values()]
        assert len(places) == len(set(places)), "a client is once in a round"
        assert {ticket.issued_in for _, ticket in self.tickets.values()} <= self.rounds.keys()


@given(st.data())
def test_any_sequence_counts_each_update_once_and_writes_all_that_a_restart_needs(data: st.DataObject) -> None:
    now, counted, received = 1000.0, dict[str, int](), set[str]()
    table = Table(RunStatus(0, RunState.RUNNING, "", 0, Round(RUN, 1)))
    for _ in range(30):
        state = table.status.round
        now += data.draw(st.sampled_from([0.0, 1.0, 601.0]))
        ticket = data.draw(st.sampled_from(out)).id if (out := state.in_state(TicketState.ISSUED)) else ""
        some = Waiting(frozenset(data.draw(st.sets(st.sampled_from(NAMES[:8])))))
        kinds = {"waits": some, "time": TimePassed(), "excluded": Excluded({}), "done": Aggregated()}
        kinds |= {"pause": Paused("x"), "resume": Resumed()}
        if ticket:
            kinds |= {"in": Received(ticket), "out": Withdrawn(ticket, "x"), "refused": Refused(ticket, "x")}
        if got := state.in_state(TicketState.RECEIVED):
            kinds |= {"none folded": Excluded({each.id: "x" for each in got})}
        if table.status.version:
            kinds |= {"back": RolledBack(0)}
        event = kinds[data.draw(st.sampled_from(sorted(kinds)))]
        if isinstance(event, Received) and state.phase is Phase.AGGREGATING:
            with pytest.raises(VersionBeingMade):
                transition(table.status, [event], CONFIG, now)
            continue
        changes = transition(table.status, [event], CONFIG, now)
        if changes is None:
            continue
        table.write(changes)
        table.check(now)
        received |= {event.ticket} if isinstance(event, Received) else set()
        if changes.round.phase is Phase.COMMITTED:
            folded = changes.round.in_state(TicketState.RECEIVED)
            assert not counted.keys() & {each.id for each in folded}
            counted |= {each.id: changes.round.number for each in folded}
            assert all(0 <= changes.round.staleness(each) <= 2 for each in folded)
        if not table.status.is_active:
            break
        state = table.status.round
        held = [t for t in state.in_state(TicketState.ISSUED) if now < t.issued_at + CONFIG.deadline_s]
        assert len(held) <= 5
        assert len(state.in_state(TicketState.RECEIVED)) <= 2
        assert all(0 <= state.staleness(t) <= 2 for t in state.tickets)
        assert [t.client for t in state.tickets] == sorted({t.client for t in state.tickets})
        assert state.phase is not Phase.WAITING or not state.tickets
        assert state.phase is not Phase.OPEN or (table.status.state is RunState.PAUSED) is (state.deadline is None)
    lost = {t for t in received if table.tickets[t][1].state not in (TicketState.RECEIVED, TicketState.REFUSED)}
    assert not lost, "a receipt counts, unless the update is excluded or taken back"


RUN_FILE = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "bias"}}


@pytest.mark.parametrize(
    ("rounds", "text"),
    [
        ({"policy": "chaotic"}, "there is no round policy 'chaotic'; there are: buffered, relayed, synchronous"),
        ({"concurrency": 3}, 'concurrency is not a setting of rounds with policy = "synchronous"'),
        ({"policy": "synchronous", "max_staleness": 3}, 'is not a setting of rounds with policy = "synchronous"'),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(rounds: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_config({**RUN_FILE, "rounds": rounds})
    assert text in caught.value.message
