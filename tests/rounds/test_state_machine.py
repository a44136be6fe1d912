"""The round's state machine: each rule by example; any sequence of events is in `test_round_sequences`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config import RoundsConfig
from fedpeft.errors import RoundClosed, TicketClosed, TicketNotFound
from fedpeft.rounds.events import (
    Aggregate,
    Aggregated,
    Event,
    Issue,
    Pause,
    Paused,
    Received,
    Refused,
    Resumed,
    Stopped,
    TimePassed,
    Waiting,
    Withdrawn,
)
from fedpeft.rounds.state_machine import GATHER_S, Phase, Round, advance, sample, ticket_id
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState

RUN = "run-000000000001"
NAMES = [f"client-{i:02}" for i in range(12)]
ORDER = list(Phase)


def names(count: int) -> frozenset[str]:
    return frozenset(NAMES[:count])


def opened(config: RoundsConfig, clients: int | None = None, now: float = 1000.0) -> Round:
    state, effects = advance(Round(RUN, 1), Waiting(names(clients or config.available)), config, now)
    assert isinstance(effects[0], Issue)
    return state


def after(state: Round, config: RoundsConfig, *events: Event, now: float = 1001.0) -> Round:
    for event in events:
        state, _ = advance(state, event, config, now)
    return state


def received(state: Round, config: RoundsConfig, count: int) -> Round:
    return after(state, config, *(Received(t.id) for t in state.in_state(TicketState.ISSUED)[:count]))


class TestOpening:
    def test_waits_until_enough_clients_are_there(self) -> None:
        config = RoundsConfig(clients=2, min_available=4)
        state = Round(RUN, 1)
        assert advance(state, Waiting(names(3)), config, 0.0) == (state, ())
        assert advance(state, Waiting(names(4)), config, 0.0)[0].phase is Phase.OPEN

    def test_gives_a_ticket_to_each_sampled_client_and_sets_the_deadline(self) -> None:
        config = RoundsConfig(clients=4, over_selection=0.5, deadline_s=60, min_available=8)
        state, (issue,) = advance(Round(RUN, 3), Waiting(names(10)), config, 1000.0)
        assert (state.opened_at, state.deadline, state.base_version) == (1000.0, 1060.0, 2)
        assert isinstance(issue, Issue) and issue.tickets == state.tickets
        assert len(state.tickets) == 6
        assert [t.client for t in state.tickets] == sample(names(10), 6, config.seed, 3)
        assert {t.state for t in state.tickets} == {TicketState.ISSUED}

    @pytest.mark.parametrize(("number", "waited_s"), [(2, GATHER_S), (1, 600.0)])
    def test_a_client_that_never_comes_back_holds_no_round_for_ever(self, number: int, waited_s: float) -> None:
        """The quorum of 8 is 6: with one frozen client 7 wait."""
        config, state = RoundsConfig(), Round(RUN, number)
        assert advance(state, Waiting(names(7), waited_s=waited_s - 1), config, 1000.0) == (state, ())
        assert advance(state, Waiting(names(5), waited_s=1e9), config, 1000.0) == (state, ())
        state, (issue,) = advance(state, Waiting(names(7), waited_s=waited_s), config, 1000.0)
        assert isinstance(issue, Issue) and len(issue.tickets) == 7
        state, (late,) = advance(state, Waiting(names(8)), config, 1001.0)
        assert isinstance(late, Issue) and [t.client for t in late.tickets] == [NAMES[7]], "who comes late takes part"

    def test_without_the_frozen_client_the_round_closes_as_soon_as_the_others_are_done(self) -> None:
        config = RoundsConfig()
        state, _ = advance(Round(RUN, 2), Waiting(names(7), waited_s=GATHER_S), config, 1000.0)
        state = received(state, config, 7)
        assert after(state, config, Waiting(names(7))).phase is Phase.AGGREGATING

    def test_one_frozen_client_of_eight_holds_its_own_round_for_one_deadline(self) -> None:
        config = RoundsConfig()
        state = received(opened(config), config, 7)
        state, effects = advance(state, TimePassed(), config, 1000.0 + config.deadline_s)
        assert (config.deadline_s, effects) == (600.0, (Aggregate(),))

    def test_a_run_that_says_how_many_must_wait_is_taken_at_its_word(self) -> None:
        config, state = RoundsConfig(clients=4, min_available=4), Round(RUN, 2)
        assert advance(state, Waiting(names(3), waited_s=1e9), config, 0.0) == (state, ())

    def test_all_clients_open_it_at_once_as_ever(self) -> None:
        for waited_s in (0.0, 1e9):
            state, _ = advance(Round(RUN, 1), Waiting(names(12), waited_s=waited_s), RoundsConfig(seed=3), 1000.0)
            assert [t.client for t in state.tickets] == sample(names(12), 8, 3, 1)

    def test_time_alone_opens_nothing(self) -> None:
        state = Round(RUN, 1)
        assert after(state, RoundsConfig(clients=1), TimePassed(), now=1e9).phase is Phase.WAITING

    def test_the_sample_depends_on_seed_and_round_and_not_on_order(self) -> None:
        chosen = sample(NAMES, 4, 7, 1)
        assert chosen == sample(reversed(NAMES), 4, 7, 1) == sorted(chosen)
        assert len({tuple(sample(NAMES, 4, seed, number)) for seed in range(5) for number in range(1, 6)}) > 10
        assert sample(NAMES, 40, 7, 1) == NAMES

    def test_the_id_of_a_ticket_names_run_round_and_client(self) -> None:
        ids = {ticket_id(run, number, client) for run in "ab" for number in (1, 2) for client in "xy"}
        assert len(ids) == 8
        assert all(len(i) == 23 and i.startswith("ticket-") for i in ids)


class TestReceiving:
    def test_the_goal_closes_the_round_and_the_rest_is_late(self) -> None:
        config = RoundsConfig(clients=2, over_selection=0.5)
        state = received(opened(config), config, 1)
        assert (state.phase, len(state.in_state(TicketState.RECEIVED))) == (Phase.OPEN, 1)
        last = state.in_state(TicketState.ISSUED)[0]
        state, effects = advance(state, Received(last.id), config, 1001.0)
        assert effects == (Aggregate(),)
        assert (state.phase, state.deadline) == (Phase.AGGREGATING, None)
        (late,) = state.in_state(TicketState.LATE)
        assert late.reason
        with pytest.raises(RoundClosed):
            advance(state, Received(late.id), config, 1002.0)

    def test_a_repetition_changes_nothing_in_any_phase(self) -> None:
        config = RoundsConfig(clients=1)
        state = received(opened(config), config, 1)
        ticket = state.tickets[0].id
        for _ in range(2):
            assert advance(state, Received(ticket), config, 1e9)[0] is state
            state = after(state, config, Aggregated())
        assert state.phase is Phase.COMMITTED

    @pytest.mark.parametrize("event", [Withdrawn, Refused])
    def test_a_ticket_given_up_or_refused_takes_nothing(self, event: type[Withdrawn] | type[Refused]) -> None:
        config = RoundsConfig(clients=2)
        state = opened(config)
        ticket = state.tickets[0]
        state = after(state, config, event(ticket.id, "no disk"))
        with pytest.raises(TicketClosed, match="no disk"):
            advance(state, Received(ticket.id), config, 1001.0)
        assert advance(state, event(ticket.id, "again"), config, 1001.0)[0] is state

    @pytest.mark.parametrize("event", [Withdrawn, Refused])
    def test_what_was_received_cannot_be_given_up(self, event: type[Withdrawn] | type[Refused]) -> None:
        config = RoundsConfig(clients=2)
        state = received(opened(config), config, 1)
        (ticket,) = state.in_state(TicketState.RECEIVED)
        assert advance(state, event(ticket.id, "changed my mind"), config, 1001.0)[0] is state

    @pytest.mark.parametrize("event", [Received("ticket-x"), Withdrawn("ticket-x", ""), Refused("ticket-x", "")])
    def test_an_unknown_ticket_is_said_to_be_one(self, event: Event) -> None:
        config = RoundsConfig(clients=1)
        with pytest.raises(TicketNotFound, match="ticket-x"):
            advance(opened(config), event, config, 1001.0)


class TestReplacing:
    def test_a_withdrawn_client_is_replaced_at_once(self) -> None:
        config = RoundsConfig(clients=2)
        state = opened(config)
        gone = state.tickets[0]
        state = after(state, config, Withdrawn(gone.id, "bye"))
        state, (issue,) = advance(state, Waiting(names(5)), config, 1002.0)
        assert isinstance(issue, Issue) and len(issue.tickets) == 1
        assert state.ticket_of(issue.tickets[0].client) == issue.tickets[0]
        assert gone.client not in {t.client for t in issue.tickets}
        assert state.deadline == 1000.0 + config.deadline_s

    def test_a_client_that_gave_its_ticket_back_has_it_again_after_an_extension_if_nobody_else_is_there(self) -> None:
        """With as many clients as the quorum the round could not end otherwise."""
        config = RoundsConfig(clients=2, quorum=2, deadline_s=60)
        state = received(opened(config), config, 1)
        (gone,) = state.in_state(TicketState.ISSUED)
        state = after(state, config, Withdrawn(gone.id, "no room"))
        assert advance(state, Waiting(names(2)), config, 1002.0)[0] is state, "not at once: its trouble may last"
        state = after(state, config, TimePassed(), now=1060.0)
        state, (issue,) = advance(state, Waiting(names(2)), config, 1061.0)
        assert isinstance(issue, Issue)
        assert issue.tickets == (replace(gone, generation=1, issued_at=1061.0),)
        assert len(state.tickets) == 2
        assert after(state, config, Withdrawn(gone.id, "no room"), Waiting(names(2))).in_state(TicketState.ISSUED) == ()
        assert after(state, config, Received(gone.id)).phase is Phase.AGGREGATING

    def test_others_go_before_a_client_that_gave_its_ticket_back(self) -> None:
        config = RoundsConfig(clients=2, quorum=2, deadline_s=60)
        state = received(opened(config), config, 1)
        (gone,) = state.in_state(TicketState.ISSUED)
        state = after(state, config, Withdrawn(gone.id, "no room"), TimePassed(), now=1060.0)
        state, (issue,) = advance(state, Waiting(names(3)), config, 1061.0)
        assert isinstance(issue, Issue) and [t.client for t in issue.tickets] == [NAMES[2]]

    def test_a_client_that_gave_its_ticket_back_has_it_again_once_the_run_is_resumed(self) -> None:
        config = RoundsConfig(clients=2, quorum=2, deadline_s=60, max_extensions=0)
        state = received(opened(config), config, 1)
        (gone,) = state.in_state(TicketState.ISSUED)
        state = after(state, config, Withdrawn(gone.id, "no room"), TimePassed(), now=1060.0)
        state = after(state, config, Resumed(), now=2000.0)
        state, (issue,) = advance(state, Waiting(names(2)), config, 2001.0)
        assert isinstance(issue, Issue) and issue.tickets == (replace(gone, issued_at=2001.0),)

    def test_nobody_is_sampled_while_all_tickets_are_good(self) -> None:
        config = RoundsConfig(clients=2)
        state = opened(config)
        assert advance(state, Waiting(names(9)), config, 1002.0)[0] is state

    def test_a_quorum_with_nobody_left_to_wait_for_closes_the_round(self) -> None:
        config = RoundsConfig(clients=3, quorum=2)
        state = received(opened(config), config, 2)
        (third,) = state.in_state(TicketState.ISSUED)
        state = after(state, config, Withdrawn(third.id, "bye"))
        assert state.phase is Phase.OPEN
        state, effects = advance(state, Waiting(frozenset({third.client})), config, 1002.0)
        assert (state.phase, effects) == (Phase.AGGREGATING, (Aggregate(),))

    def test_a_quorum_alone_does_not_close_the_round_while_somebody_is_awaited(self) -> None:
        config = RoundsConfig(clients=3, quorum=1)
        state = received(opened(config), config, 1)
        for clients in (frozenset[str](), names(3), names(12)):
            assert advance(state, Waiting(clients), config, 1002.0)[0] is state

    def test_without_a_quorum_it_waits_for_the_deadline_though_nobody_is_left(self) -> None:
        config = RoundsConfig(clients=2, quorum=2)
        state = opened(config)
        state = after(state, config, *(Refused(t.id, "nan") for t in state.tickets), Waiting(frozenset()))
        assert state.phase is Phase.OPEN


class TestDeadlines:
    def test_nothing_happens_before(self) -> None:
        config = RoundsConfig(clients=1, deadline_s=60)
        state = opened(config)
        assert advance(state, TimePassed(), config, 1059.9)[0] is state

    def test_with_a_quorum_the_round_closes(self) -> None:
        config = RoundsConfig(clients=3, quorum=1, deadline_s=60)
        state, effects = advance(received(opened(config), config, 1), TimePassed(), config, 1060.0)
        assert (state.phase, effects) == (Phase.AGGREGATING, (Aggregate(),))
        assert len(state.in_state(TicketState.LATE)) == 2

    def test_without_one_it_is_extended_and_stragglers_are_replaced_but_stay_good(self) -> None:
        config = RoundsConfig(clients=2, quorum=2, deadline_s=60)
        state = received(opened(config), config, 1)
        (straggler,) = state.in_state(TicketState.ISSUED)
        state, effects = advance(state, TimePassed(), config, 1075.0)
        assert (state.phase, state.extensions, state.deadline, effects) == (Phase.OPEN, 1, 1135.0, ())
        state, (issue,) = advance(state, Waiting(names(5)), config, 1076.0)
        assert isinstance(issue, Issue) and [t.generation for t in issue.tickets] == [1]
        assert advance(state, Waiting(names(9)), config, 1077.0)[0] is state
        assert after(state, config, Received(straggler.id)).phase is Phase.AGGREGATING

    def test_after_the_last_extension_the_run_is_paused_with_those_awaited(self) -> None:
        config = RoundsConfig(clients=2, quorum=2, deadline_s=60, max_extensions=1)
        state = received(opened(config), config, 1)
        state = after(state, config, TimePassed(), now=1060.0)
        state, (pause,) = advance(state, TimePassed(), config, 1120.0)
        (awaited,) = state.in_state(TicketState.ISSUED)
        assert isinstance(pause, Pause) and awaited.client in pause.reason
        assert (state.phase, state.deadline) == (Phase.OPEN, None)
        assert advance(state, TimePassed(), config, 1e9)[0] is state
        assert after(state, config, Received(awaited.id)).phase is Phase.AGGREGATING

    def test_a_round_that_does_not_open_pauses_its_run_in_the_end_and_waits_anew_once_it_is_resumed(self) -> None:
        config = RoundsConfig(clients=4, wait_s=3600)
        state = after(Round("run-x", 1), config, TimePassed(), now=1000.0)
        assert (state.phase, state.deadline) == (Phase.WAITING, 4600.0)
        assert advance(state, TimePassed(), config, 4599.0) == (state, ())
        waited, (pause,) = advance(state, TimePassed(), config, 4600.0)
        assert (waited.phase, waited.deadline) == (Phase.WAITING, None)
        reason = "round 1 needs 3 clients to open, and fewer were there at the end of 60 min"
        assert isinstance(pause, Pause) and pause.reason == reason
        assert after(after(waited, config, Resumed(), now=9e5), config, TimePassed(), now=1e6).deadline == 1e6 + 3600
        assert after(state, config, Waiting(names(4)), now=2000.0).deadline == 2600.0

    def test_resuming_gives_a_fresh_deadline_and_all_extensions_back(self) -> None:
        config = RoundsConfig(clients=1, deadline_s=60, max_extensions=0)
        state = opened(config)
        assert advance(state, Resumed(), config, 1001.0)[0] is state
        state = after(state, config, TimePassed(), now=1060.0)
        state = after(state, config, Resumed(), now=5000.0)
        assert (state.deadline, state.extensions) == (5060.0, 0)
        assert {t.generation for t in state.tickets} == {0}

    def test_resuming_awaits_the_stragglers_in_good_time_again(self) -> None:
        config = RoundsConfig(clients=2, quorum=2, deadline_s=60, max_extensions=1)
        state = after(opened(config), config, TimePassed(), now=1060.0)
        state = after(state, config, Waiting(names(4)), now=1061.0)
        state = after(state, config, TimePassed(), now=1120.0)
        state = after(state, config, Resumed(), now=2000.0)
        assert [t.generation for t in state.tickets] == [0, 0, 0, 0]
        assert advance(state, Waiting(names(12)), config, 2001.0)[0] is state

    def test_no_deadline_runs_out_while_a_run_is_paused_and_resuming_gives_a_fresh_one(self) -> None:
        config = RoundsConfig(clients=2, quorum=1, deadline_s=60, max_extensions=1)
        state = received(opened(config), config, 1)
        paused, effects = advance(state, Paused(), config, 1010.0)
        assert (paused.phase, paused.deadline, effects) == (Phase.OPEN, None, ())
        assert advance(paused, TimePassed(), config, 1e9) == (paused, ())
        resumed = after(paused, config, Resumed(), now=5000.0)
        assert (resumed.deadline, resumed.extensions) == (5060.0, 0)
        (awaited,) = paused.in_state(TicketState.ISSUED)
        assert after(paused, config, Received(awaited.id)).phase is Phase.AGGREGATING, "what comes meanwhile counts"
        for other in (Round(RUN, 1), after(opened(config), config, Stopped())):
            assert advance(other, Paused(), config, 1.0) == (other, ())


class TestEnding:
    def test_only_an_aggregating_round_is_committed(self) -> None:
        config = RoundsConfig(clients=1)
        for state in (Round(RUN, 1), opened(config)):
            assert advance(state, Aggregated(), config, 1001.0)[0] is state
        assert after(received(opened(config), config, 1), config, Aggregated()).phase is Phase.COMMITTED

    def test_stopping_closes_the_open_tickets_for_good(self) -> None:
        config = RoundsConfig(clients=2)
        state = received(opened(config), config, 1)
        state, effects = advance(state, Stopped(), config, 1001.0)
        assert (effects, state.deadline) == ((), None)
        (late,) = state.in_state(TicketState.LATE)
        with pytest.raises(RoundClosed):
            advance(state, Received(late.id), config, 1002.0)

    @pytest.mark.parametrize("received_before", [0, 2, 3])
    def test_after_stopping_nothing_is_issued_folded_or_committed(self, received_before: int) -> None:
        config = RoundsConfig(clients=3, quorum=2)
        stopped = after(received(opened(config), config, received_before), config, Stopped())
        for event in (Waiting(names(12)), TimePassed(), Paused(), Resumed(), Aggregated(), Stopped()):
            assert advance(stopped, event, config, 1e9) == (stopped, ())

    def test_a_round_that_never_opened_can_be_stopped(self) -> None:
        config = RoundsConfig(clients=1)
        stopped = after(Round(RUN, 1), config, Stopped(), Waiting(names(12)))
        assert (stopped.phase, stopped.tickets) == (Phase.WAITING, ())

    def test_what_is_committed_is_not_stopped(self) -> None:
        config = RoundsConfig(clients=1)
        state = after(received(opened(config), config, 1), config, Aggregated())
        assert advance(state, Stopped(), config, 1e9)[0] is state


def test_rounds_and_tickets_cannot_be_changed_in_place() -> None:
    state = opened(RoundsConfig(clients=1))
    assert replace(state, extensions=1) is not state
    with pytest.raises(AttributeError):
        state.phase = Phase.COMMITTED  # type: ignore[misc]


@given(st.sets(st.text(min_size=1, max_size=3), max_size=9), st.text(max_size=3))
def test_the_ticket_of_a_client_is_found_among_any(clients: set[str], wanted: str) -> None:
    tickets = Tickets(Ticket(f"ticket-{client}", client) for client in sorted(clients))
    found = Round("run-a", 1, tickets=tickets).ticket_of(wanted)
    assert found == next((ticket for ticket in tickets if ticket.client == wanted), None)
