"""The round's state machine under any sequence of events."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from fedpeft.rounds.state_machine import Phase, Round, advance, ticket_id
from fedpeft.rounds.tickets import Ticket, TicketState

from .test_state_machine import NAMES, RUN, after, opened

ORDER = list(Phase)
PAUSABLE = (Phase.WAITING, Phase.OPEN)


configs = st.builds(
    lambda clients, quorum, spare, deadline_s, over, extensions, wait_s, seed: RoundsConfig(
        clients=clients,
        quorum=min(quorum, clients) or None,
        min_available=None if spare is None else RoundsConfig(clients=clients, over_selection=over).sampled + spare,
        deadline_s=deadline_s,
        over_selection=over,
        max_extensions=extensions,
        wait_s=wait_s,
        seed=seed,
    ),
    clients=st.integers(1, 6),
    quorum=st.integers(0, 6),
    spare=st.none() | st.integers(0, 3),
    deadline_s=st.sampled_from([1.0, 60.0]),
    over=st.sampled_from([0.0, 0.2, 1.0]),
    extensions=st.integers(0, 3),
    wait_s=st.none() | st.just(60.0),
    seed=st.integers(0, 3),
)


def reissued(before: Ticket, now: Ticket) -> bool:
    """Returns True if a ticket that was given back was issued again, after an extension or a resumption."""
    states = before.state, now.state
    return states == (TicketState.WITHDRAWN, TicketState.ISSUED) and before.generation < now.generation


class AnySequence(RuleBasedStateMachine):
    """Drives one round with whatever may happen, and holds its promises after each step."""

    @initialize(config=configs)
    def begin(self, config: RoundsConfig) -> None:
        self.config = config
        self.now = 1000.0
        self.state = Round(RUN, 1)
        self.present: set[str] = set()
        self.history: list[tuple[Event, float]] = []
        self.paused = False

    def step(self, event: Event) -> None:
        before = self.state
        self.history.append((event, self.now))
        try:
            self.state, effects = advance(before, event, self.config, self.now)
        except (RoundClosed, TicketClosed):
            assert isinstance(event, Received)
            assert before.ticket(event.ticket).state is not TicketState.RECEIVED
            self.history.pop()
            return
        assert effects == () or self.state is not before
        self.check_step(before, event)
        self.check_effects(before, effects)

    def check_step(self, before: Round, event: Event) -> None:
        assert ORDER.index(before.phase) <= ORDER.index(self.state.phase)
        for ticket in before.tickets:
            now = self.state.ticket(ticket.id)
            assert now.client == ticket.client
            if ticket.state is not TicketState.ISSUED and not reissued(ticket, now):
                assert now.state is ticket.state
            if now.state is TicketState.LATE:
                assert self.state.phase in (Phase.AGGREGATING, Phase.COMMITTED) or self.state.stopped
        if self.state == before:
            assert self.state is before
        if before.stopped:
            assert self.state is before
        if isinstance(event, Received) and before.phase is Phase.OPEN:
            assert self.state.ticket(event.ticket).state is TicketState.RECEIVED

    def check_effects(self, before: Round, effects: tuple[object, ...]) -> None:
        earlier = {t.client: before.ticket_of(t.client) for t in self.state.tickets}
        new = tuple(t for t in self.state.tickets if (b := earlier[t.client]) is None or reissued(b, t))
        issued = tuple(t for e in effects if isinstance(e, Issue) for t in e.tickets)
        assert new == issued
        assert {t.client for t in new} <= self.present
        assert (Aggregate() in effects) == (before.phase is Phase.OPEN and self.state.phase is Phase.AGGREGATING)
        if Aggregate() in effects and isinstance(self.history[-1][0], Waiting):
            assert not before.in_state(TicketState.ISSUED)
        if any(isinstance(e, Pause) for e in effects):
            assert self.state.phase in PAUSABLE and self.state.deadline is None
            self.paused = True

    def ticket(self, data: st.DataObject) -> Ticket:
        return data.draw(st.sampled_from(self.state.tickets))

    @precondition(lambda self: not self.paused or self.state.phase is not Phase.WAITING)
    @rule(clients=st.sets(st.sampled_from(NAMES)), waited_s=st.sampled_from([0.0, 60.0, 1e9]))
    def come_and_go(self, clients: set[str], waited_s: float) -> None:
        self.present = clients
        before = self.state
        self.step(Waiting(frozenset(clients), waited_s=waited_s))
        if self.state.phase is Phase.OPEN and before.phase is Phase.WAITING:
            assert len(self.state.tickets) >= self.config.needed

    @precondition(lambda self: not self.paused or self.state.phase is not Phase.WAITING)
    @rule()
    def everybody_comes(self) -> None:
        self.come_and_go(set(NAMES), 0.0)

    @precondition(lambda self: self.state.tickets)
    @rule(data=st.data())
    def receive(self, data: st.DataObject) -> None:
        self.step(Received(self.ticket(data).id))

    @precondition(lambda self: self.state.tickets)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        self.step(Withdrawn(self.ticket(data).id, "leaving"))

    @precondition(lambda self: self.state.tickets)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        self.step(Refused(self.ticket(data).id, "not finite"))

    @precondition(lambda self: not self.paused)
    @rule(seconds=st.sampled_from([0.5, 30.0, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.step(TimePassed())

    @rule()
    def pause(self) -> None:
        self.paused |= self.state.phase in PAUSABLE and not self.state.stopped
        self.step(Paused())

    @rule()
    def resume(self) -> None:
        if self.state.phase in PAUSABLE and not self.state.stopped:
            self.paused = False
        self.step(Resumed())

    @rule()
    def aggregated(self) -> None:
        self.step(Aggregated())

    @precondition(lambda self: len(self.history) > 8)
    @rule()
    def stop(self) -> None:
        self.step(Stopped())
        assert self.state.stopped or self.state.phase is Phase.COMMITTED

    @precondition(lambda self: self.history)
    @rule(kind=st.sampled_from([Received, lambda t: Withdrawn(t, ""), lambda t: Refused(t, "")]))
    def a_stranger_comes(self, kind: type[Received]) -> None:
        with pytest.raises(TicketNotFound):
            advance(self.state, kind("ticket-of-nobody"), self.config, self.now)

    @invariant()
    def one_ticket_a_client_in_their_order(self) -> None:
        clients = [t.client for t in self.state.tickets]
        assert clients == sorted(set(clients))
        assert all(t.id == ticket_id(RUN, 1, t.client) for t in self.state.tickets)

    @invariant()
    def never_more_sampled_than_allowed(self) -> None:
        """At most `sampled` may count or be awaited in good time; only stragglers of missed deadlines come on top."""
        received = self.state.in_state(TicketState.RECEIVED)
        assert len(received) <= self.config.clients
        if any(isinstance(event, Resumed) for event, _ in self.history):
            return  # Resuming forgives the stragglers: all of them are awaited in good time again.
        for generation in range(self.state.extensions + 1):
            awaited = [t for t in self.state.in_state(TicketState.ISSUED) if t.generation == generation]
            assert len(awaited) <= self.config.sampled
        if self.state.extensions == 0:
            assert len(received) + len(self.state.in_state(TicketState.ISSUED)) <= self.config.sampled

    @invariant()
    def closes_only_with_what_it_needs(self) -> None:
        received = len(self.state.in_state(TicketState.RECEIVED))
        if self.state.phase in (Phase.AGGREGATING, Phase.COMMITTED):
            assert self.config.needed <= received <= self.config.clients
            assert not self.state.in_state(TicketState.ISSUED)
        if self.state.phase is Phase.WAITING:
            assert not self.state.tickets

    @invariant()
    def has_a_deadline_exactly_while_it_can_miss_one(self) -> None:
        can = self.state.phase in PAUSABLE and not self.paused and not self.state.stopped
        assert can or self.state.deadline is None
        assert not can or self.state.deadline is not None or self.state.phase is Phase.WAITING
        assert (self.state.opened_at is not None) == (self.state.phase is not Phase.WAITING)
        assert 0 <= self.state.extensions <= self.config.max_extensions

    def teardown(self) -> None:
        if not hasattr(self, "history"):
            return
        state = Round(RUN, 1)
        for event, now in self.history:
            state, _ = advance(state, event, self.config, now)
        assert state == self.state


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@given(config=configs, order=st.permutations(range(12)))
@settings(max_examples=50, deadline=None)
def test_the_order_of_receipts_does_not_change_who_is_folded_when_all_arrive(
    config: RoundsConfig, order: list[int]
) -> None:
    """Without over-selection the same clients are folded, whoever is faster."""
    config = replace_over_selection(config)
    state = opened(config)
    ids = [t.id for t in state.tickets]
    state = after(state, config, *(Received(ids[i]) for i in order if i < len(ids)))
    assert state.phase is Phase.AGGREGATING
    assert {t.id for t in state.in_state(TicketState.RECEIVED)} == set(ids)


def replace_over_selection(config: RoundsConfig) -> RoundsConfig:
    return config.model_copy(update={"over_selection": 0.0, "min_available": None})
