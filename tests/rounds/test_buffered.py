"""Buffered rounds: a number of clients always trains, and tickets outlive the round that they were issued in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RoundsConfig, parse_config
from fedpeft.errors import ConfigInvalid, RoundClosed
from fedpeft.rounds import conduct
from fedpeft.rounds.state_machine import (
    Aggregated,
    Excluded,
    Phase,
    Received,
    Refused,
    Round,
    TimePassed,
    Waiting,
    Withdrawn,
    advance,
)
from fedpeft.rounds.tickets import TicketState

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
    return after(done.following(config), config, EVERYBODY)


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
    assert done.following(config) == Round(RUN, 2)


@given(st.data())
def test_any_sequence_keeps_the_number_at_work_and_the_staleness_within_bounds(data: st.DataObject) -> None:
    state = begun()
    for _ in range(30):
        out = state.in_state(TicketState.ISSUED)
        ticket = data.draw(st.sampled_from(out)).id if out else ""
        kinds = {"waits": EVERYBODY, "time": TimePassed(), "excluded": Excluded({}), "done": Aggregated()}
        if ticket:
            kinds |= {"in": Received(ticket), "out": Withdrawn(ticket, "x"), "refused": Refused(ticket, "x")}
        event = kinds[data.draw(st.sampled_from(sorted(kinds)))]
        if isinstance(event, Received) and state.phase is not Phase.OPEN:
            continue
        state, _ = advance(state, event, CONFIG, data.draw(st.sampled_from([0.0, 1e9])))
        assert len(state.in_state(TicketState.ISSUED)) <= 5
        assert len(state.in_state(TicketState.RECEIVED)) <= 2
        assert all(0 <= state.staleness(t) <= 2 for t in state.tickets)
        assert [t.client for t in state.tickets] == sorted({t.client for t in state.tickets})
        if state.phase is Phase.COMMITTED:
            state = state.following(CONFIG)


RUN_FILE = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "bias"}}


@pytest.mark.parametrize(
    ("rounds", "text"),
    [
        ({"policy": "chaotic"}, "there is no round policy 'chaotic'; there are: buffered, synchronous"),
        ({"concurrency": 3}, 'concurrency is not a setting of rounds with policy = "synchronous"'),
        ({"policy": "synchronous", "max_staleness": 3}, 'is not a setting of rounds with policy = "synchronous"'),
    ],
)
def test_what_is_wrong_with_a_policy_is_said(rounds: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_config({**RUN_FILE, "rounds": rounds})
    assert text in caught.value.message
