"""The state machine of a round, pure: ``(round, event) -> (round, effects)``.

    WAITING -> OPEN -> AGGREGATING -> COMMITTED

WAITING opens once enough clients wait: a seeded sample of them gets tickets. If the run does not say how many those
are, it opens without those that are missing once a quorum has waited for a while: a client that never comes back holds
nobody up, and one that comes late gets its ticket then. Where even a quorum does not come in `wait_s`, the run is
paused. OPEN takes updates until as many are there as the round wants
(the goal); until no ticket is left to wait for, nobody is there to replace the missing, and the quorum is met; or until
the deadline with a quorum. A deadline without a quorum extends the round: what was received stays,
replacements are sampled, and tickets stay good. After the last extension the run is paused. AGGREGATING takes nothing
more; an update that turns out not to be one that can be folded is excluded, and where none is left the round is OPEN
again. So it is where the server's disk lost an update: its client gets its ticket again. A round that was stopped stays
as it is, whatever comes after. `fedpeft.rounds.transitions` says what each step changes of the run.

Where tickets outlive their round (`RoundPolicy.one_version` is False) the next round is OPEN as soon as there is one,
if anybody still works, and else for whoever comes first; a round takes updates until the goal, or the deadline with a
quorum; and what comes while a version is being made waits for the next one (`VersionBeingMade`).

Where another server makes the versions (`RoundPolicy.makes_versions` is False) a round makes a sum, and opens only once
the version before it was supplied. One that is not over when a later version comes is stopped.

Who gets tickets, and what becomes of those still out when a round closes, is the run's policy (`RoundPolicy`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from heapq import nsmallest
from typing import ClassVar

from fedpeft import seeds
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RoundsConfig, RunConfig
from fedpeft.config_errors import Fault
from fedpeft.errors import RoundClosed, TicketNotFound, VersionBeingMade
from fedpeft.formatting import counted, duration
from fedpeft.registry import Registry
from fedpeft.rounds.events import (
    Aggregate,
    Aggregated,
    Differed,
    Effect,
    Event,
    Excluded,
    Issue,
    Lost,
    Pause,
    Paused,
    Received,
    Refused,
    Resumed,
    RolledBack,
    Stopped,
    Supplied,
    TimePassed,
    Waiting,
    Withdrawn,
)
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState

GATHER_S = 60.0
"""A quorum that waits for so long need not wait for more clients; before the first round, while people start the sites,
for as long as a round's deadline if that is longer."""
ROLLBACK_REASON = "the run was rolled back to version"
"""The first words of the reason of tickets that a rollback discards."""


class Phase(StrEnum):
    """Phase of a round."""

    WAITING = "waiting"
    OPEN = "open"
    AGGREGATING = "aggregating"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a run. Times are seconds since the epoch."""

    run: str
    number: int
    phase: Phase = Phase.WAITING
    tickets: Tickets = field(default_factory=Tickets)
    opened_at: float | None = None
    deadline: float | None = None
    extensions: int = 0
    stopped: bool = False

    @property
    def base_version(self) -> int:
        """The adapter version that tickets issued in this round start from."""
        return self.number - 1

    @property
    def without_tickets(self) -> Round:
        """The round's own fields, to be compared with those of another state: its tickets are many."""
        return replace(self, tickets=Tickets())

    def staleness(self, ticket: Ticket) -> int:
        """Returns how many versions were made since the one that a ticket starts from."""
        return self.base_version - ticket.base_version

    def following(self, config: RoundsConfig, now: float) -> Round:
        """Returns the round after this one, as it begins at a time: open if tickets outlived this one."""
        carried = Tickets(policy_of(config).carried(self))
        begun = Round(self.run, self.number + 1, tickets=carried)
        return begun.opened(config, now) if carried else begun

    def opened(self, config: RoundsConfig, now: float) -> Round:
        """Returns the round as it opens at a time."""
        return replace(self, phase=Phase.OPEN, opened_at=now, deadline=now + config.deadline_s)

    def is_usable(self, ticket: Ticket) -> bool:
        """Returns whether an update that comes for a ticket counts in this round, or in the one after it."""
        return ticket.state is TicketState.ISSUED and self.phase in (Phase.OPEN, Phase.AGGREGATING)

    def in_state(self, state: TicketState) -> tuple[Ticket, ...]:
        """Returns the tickets in one state."""
        return tuple(t for t in self.tickets if t.state is state)

    def ticket(self, ticket_id: str) -> Ticket:
        """Returns a ticket by id.

        Raises:
            TicketNotFound: If the round has none of that id.
        """
        found = self.tickets.find(ticket_id)
        if found is None:
            raise TicketNotFound(f"round {self.number} of {self.run} has no ticket {ticket_id}")
        return found

    def ticket_of(self, client: str) -> Ticket | None:
        """Returns the ticket of a client, if it was sampled."""
        return self.tickets.of_client(client)


Step = tuple[Round, tuple[Effect, ...]]


def ticket_id(run: str, number: int, client: str) -> str:
    """Returns the id of the ticket of a client in a round; a client has at most one."""
    return "ticket-" + hashlib.sha256(f"{run}\x1f{number}\x1f{client}".encode()).hexdigest()[:16]


def due(state: Round, ticket: Ticket, config: RoundsConfig) -> float | None:
    """Returns when a ticket's update is due: at the round's deadline; if it outlives the round, when its place is lost.

    None if no deadline runs.
    """
    if policy_of(config).one_version:
        return state.deadline
    return ticket.issued_at + config.deadline_s


_NONE: Mapping[str, int] = {}


class _Ranks(dict[str, int]):
    """Ranks of clients in a round, each worked out once: a buffered round gives a place away with every arrival."""

    def __init__(self, seed: int, number: int) -> None:
        super().__init__()
        self._seed, self._number = seed, number

    def __missing__(self, client: str) -> int:
        self[client] = rank = seeds.sampling_rank(self._seed, self._number, client)
        return rank


_ranks = lru_cache(maxsize=4)(_Ranks)
MOST_RANKED = 50_000
"""Clients whose ranks are kept from one sampling of a round to the next: some 8 MB; more are ranked anew."""


def sample(
    candidates: Iterable[str], count: int, seed: int, number: int, demerits: Mapping[str, int] = _NONE
) -> list[str]:
    """Returns up to `count` of the candidates, the same ones for the same arguments, sorted."""
    known = list(candidates)
    ranks = _ranks(seed, number) if len(known) <= MOST_RANKED else _Ranks(seed, number)

    def rank(client: str) -> tuple[int, int, str]:
        return demerits.get(client, 0), ranks[client], client

    return sorted(nsmallest(count, known, key=rank))


class RoundPolicy(ABC):
    """Chooses the clients of a round, and the fate of the tickets that are out when it closes. Pure, without state."""

    one_version: ClassVar[bool] = True
    """True if all updates of a round start from the version before it: tickets that are out when it closes are LATE."""
    has_clock: ClassVar[bool] = False
    """True if a simulation of the rounds has a clock: clients are at work for a time that is drawn, and a free place
    is given away at once. If not, the clients of a round arrive in an order that is drawn anew."""
    makes_versions: ClassVar[bool] = True
    """False if a round makes a sum for a parent's server, which makes the versions."""
    settings: ClassVar[frozenset[str]] = frozenset()
    """Keys of `[rounds]` that only rounds of some policies have (`concurrency`, `max_staleness`), and these do."""

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """Returns a field of a run with which such rounds cannot work, and why; None if there is none."""
        return None

    @abstractmethod
    def wanted(self, state: Round, config: RoundsConfig, now: float) -> int:
        """Returns how many more clients an open round would give tickets to at time `now`."""

    def late_for(self, state: Round, ticket: Ticket, config: RoundsConfig) -> str:
        """Returns why a ticket that is out is late when its round closes; empty if it stays good.

        It is not asked if `one_version`: then all are.
        """
        return ""

    def carried(self, closed: Round) -> tuple[Ticket, ...]:
        """Returns the tickets with which the round after a closed one begins; none if `one_version`."""
        if self.one_version:
            return ()
        return tuple(replace(ticket, generation=0) for ticket in closed.in_state(TicketState.ISSUED))


policies: Registry[RoundPolicy] = Registry("fedpeft.rounds.policies", "fedpeft.policies", "round policy")


def policy_of(config: RoundsConfig) -> RoundPolicy:
    """Returns the policy of a run's rounds."""
    return policies.get(config.policy_name)


def advance(state: Round, event: Event, config: RoundsConfig, now: float) -> Step:
    """Returns the round after an event at time `now`, and what must be done because of it.

    An event that changes nothing returns the very same round.

    Raises:
        TicketNotFound: If the event names a ticket that the round does not have.
        RoundClosed: If an update comes when the round takes none.
        VersionBeingMade: If the update will count in the round after this one, which is being folded.
        TicketClosed: If an update comes for a ticket that was withdrawn or refused.
    """
    match event:
        case _ if state.stopped and not isinstance(event, Received | Withdrawn | Refused | Stopped):
            return state, ()
        case Waiting():
            return _waiting(state, event, config, now)
        case Received(ticket):
            return _received(state, ticket, config)
        case Withdrawn(ticket, reason):
            return _close_ticket(state, ticket, TicketState.WITHDRAWN, reason)
        case Refused(ticket, reason):
            return _close_ticket(state, ticket, TicketState.REFUSED, reason)
        case TimePassed():
            return _time_passed(state, config, now)
        case Paused() | Differed():
            return (state, ()) if state.deadline is None else (replace(state, deadline=None), ())
        case Resumed():
            return _resumed(state, config, now)
        case Excluded(reasons):
            return _excluded(state, reasons, config, now)
        case Lost(reasons):
            return _lost(state, reasons, config, now)
        case Aggregated():
            return (replace(state, phase=Phase.COMMITTED), ()) if state.phase is Phase.AGGREGATING else (state, ())
        case RolledBack(to):
            return _rolled_back(state, to)
        case Supplied(version):
            return _supplied(state, version)
        case Stopped():
            return _stopped(state)


def _waiting(state: Round, event: Waiting, config: RoundsConfig, now: float) -> Step:
    policy = policy_of(config)
    if state.phase is Phase.WAITING:
        fresh = _candidates(state, event, 0)
        if not _enough(state, len(fresh), event, config):
            return state, ()
        opened = state.opened(config, now)
        return _issue(opened, fresh, policy.wanted(opened, config, now), event.demerits, config, now)
    if state.phase is not Phase.OPEN:
        return state, ()
    missing = policy.wanted(state, config, now)  # as a rule nobody, and none need be looked for
    if missing > 0 and (fresh := _candidates(state, event, missing)):
        return _issue(state, fresh, missing, event.demerits, config, now)
    nobody_left = policy.one_version and not state.tickets.number(TicketState.ISSUED)
    if nobody_left and state.tickets.number(TicketState.RECEIVED) >= config.needed:
        return _aggregate(state, config)
    return state, ()


def _candidates(state: Round, event: Waiting, wanted: int) -> AbstractSet[str]:
    """Returns the waiting clients without a ticket; if they are too few, also those whose trouble may be over.

    That is who gave a ticket back before the last extension or resumption: a disk that was full, say, has room again.
    """
    fresh = event.clients - {ticket.client for ticket in state.tickets}
    if len(fresh) >= wanted:
        return fresh
    back = {t.client for t in state.in_state(TicketState.WITHDRAWN) if t.generation < state.extensions}
    return fresh | (event.clients & back)


def _enough(state: Round, fresh: int, event: Waiting, config: RoundsConfig) -> bool:
    there = fresh + len(state.tickets)
    if there >= config.available:
        return True
    if not begins_together(state, config):
        return there > 0
    gather_s = GATHER_S if state.number > 1 else max(GATHER_S, config.deadline_s)
    return there >= config.least_available and event.waited_s >= gather_s


def begins_together(state: Round, config: RoundsConfig) -> bool:
    """Returns False for a round that opens for whoever is free: one of updates that start from several versions."""
    return state.number == 1 or policy_of(config).one_version


def _issue(
    state: Round, candidates: Iterable[str], count: int, demerits: Mapping[str, int], config: RoundsConfig, now: float
) -> Step:
    new = tuple(
        Ticket(
            ticket_id(state.run, state.number, client),
            client,
            generation=state.extensions,
            base_version=state.base_version,
            issued_at=now,
        )
        for client in sample(candidates, count, config.seed, state.number, demerits)
    )
    again = {ticket.client for ticket in new}
    tickets = Tickets(sorted((*(t for t in state.tickets if t.client not in again), *new), key=lambda t: t.client))
    return replace(state, tickets=tickets), (Issue(new),)


def _received(state: Round, ticket_id: str, config: RoundsConfig) -> Step:
    ticket = state.ticket(ticket_id)
    if ticket.state is TicketState.RECEIVED:
        return state, ()
    ticket.check_not_closed()
    if state.phase is Phase.AGGREGATING and state.is_usable(ticket):
        raise VersionBeingMade(
            f"version {state.number} of {state.run} is being made; the update counts in the next one"
        )
    if state.phase is not Phase.OPEN or ticket.state is TicketState.LATE:
        raise RoundClosed(f"round {state.number} of {state.run} has closed; keep the update for the next round")
    state = _set_ticket(state, replace(ticket, state=TicketState.RECEIVED, reason=""))
    if state.tickets.number(TicketState.RECEIVED) >= config.clients:
        return _aggregate(state, config)
    return state, ()


def _close_ticket(state: Round, ticket_id: str, to: TicketState, reason: str) -> Step:
    ticket = state.ticket(ticket_id)
    if ticket.state is not TicketState.ISSUED:
        return state, ()
    return _set_ticket(state, replace(ticket, state=to, reason=reason)), ()


def _time_passed(state: Round, config: RoundsConfig, now: float) -> Step:
    if state.phase is Phase.WAITING:
        return _waited(state, config, now)
    if state.phase is not Phase.OPEN or state.deadline is None or now < state.deadline:
        return state, ()
    received = state.tickets.number(TicketState.RECEIVED)
    if received >= config.needed:
        return _aggregate(state, config)
    if state.extensions >= config.max_extensions:
        awaited = ", ".join(t.client for t in state.in_state(TicketState.ISSUED)) or "nobody"
        reason = (
            f"round {state.number} has {received} of the {counted(config.needed, 'update')} it needs after "
            f"{counted(state.extensions, 'extension')}; still awaited: {awaited}{_refusals(state)}"
        )
        return replace(state, deadline=None), (Pause(reason),)
    return replace(state, extensions=state.extensions + 1, deadline=now + config.deadline_s), ()


def _waited(state: Round, config: RoundsConfig, now: float) -> Step:
    """Counts from the first look, which comes only where a round does not open soon: most need no deadline."""
    if state.deadline is None:
        return replace(state, deadline=now + config.longest_wait_s), ()
    if now < state.deadline:
        return state, ()
    least = config.least_available if begins_together(state, config) else 1
    reason = (
        f"round {state.number} needs {counted(least, 'client')} to open, and fewer were there at the "
        f"end of {duration(config.longest_wait_s)}"
    )
    return replace(state, deadline=None), (Pause(reason),)


def _refusals(state: Round) -> str:
    refused = ", ".join(t.client for t in state.in_state(TicketState.REFUSED))
    return f"; refused: {refused}" if refused else ""


def _resumed(state: Round, config: RoundsConfig, now: float) -> Step:
    if state.phase is not Phase.OPEN or state.deadline is not None:
        return state, ()
    tickets = Tickets(replace(t, generation=-1 if t.state is TicketState.WITHDRAWN else 0) for t in state.tickets)
    return replace(state, tickets=tickets, extensions=0, deadline=now + config.deadline_s), ()


def _excluded(state: Round, reasons: Mapping[str, str], config: RoundsConfig, now: float) -> Step:
    if state.phase is not Phase.AGGREGATING or not reasons:
        return state, ()
    tickets = Tickets(
        replace(t, state=TicketState.REFUSED, reason=reasons[t.id])
        if t.id in reasons and t.state is TicketState.RECEIVED
        else t
        for t in state.tickets
    )
    left = replace(state, tickets=tickets)
    if not left.tickets.number(TicketState.RECEIVED):
        left = replace(left, phase=Phase.OPEN, deadline=now + config.deadline_s)
    return left, ()


def _lost(state: Round, reasons: Mapping[str, str], config: RoundsConfig, now: float) -> Step:
    lost = {t.id for t in state.in_state(TicketState.RECEIVED) if t.id in reasons}
    if state.phase is not Phase.AGGREGATING or not lost:
        return state, ()
    tickets = Tickets(
        replace(t, state=TicketState.ISSUED, reason=reasons[t.id], generation=state.extensions) if t.id in lost else t
        for t in state.tickets
    )
    return replace(state, tickets=tickets, phase=Phase.OPEN, deadline=now + config.deadline_s), ()


def _rolled_back(state: Round, to: int) -> Step:
    if state.phase is Phase.COMMITTED:
        return state, ()
    reason = f"{ROLLBACK_REASON} {to}; updates of the round in progress are discarded"
    open_ = (TicketState.ISSUED, TicketState.RECEIVED)
    tickets = Tickets(
        replace(t, state=TicketState.REFUSED, reason=reason) if t.state in open_ else t for t in state.tickets
    )
    return replace(state, tickets=tickets, phase=Phase.COMMITTED, deadline=None), ()


def _supplied(state: Round, version: int) -> Step:
    if state.number > version or state.phase not in (Phase.OPEN, Phase.AGGREGATING):
        return state, ()
    reason = f"version {version} of the parent's run came before round {state.number} was over"
    return replace(_late(state, lambda _: reason), stopped=True), ()


def _stopped(state: Round) -> Step:
    if state.stopped or state.phase is Phase.COMMITTED:
        return state, ()
    return replace(_late(state, lambda _: _closed(state)), stopped=True), ()


def _aggregate(state: Round, config: RoundsConfig) -> Step:
    policy = policy_of(config)

    def late_for(ticket: Ticket) -> str:
        return closed if policy.one_version else policy.late_for(state, ticket, config)

    closed = _closed(state)
    return replace(_late(state, late_for), phase=Phase.AGGREGATING), (Aggregate(),)


def _closed(state: Round) -> str:
    return f"round {state.number} closed before the update came"


def _late(state: Round, late_for: Callable[[Ticket], str]) -> Round:
    """Closes the tickets that are out, with the reason; those without one last.

    Updates that come for the others go into their clients' residuals.
    """
    tickets = Tickets(
        replace(t, state=TicketState.LATE, reason=reason)
        if t.state is TicketState.ISSUED and (reason := late_for(t))
        else t
        for t in state.tickets
    )
    return replace(state, tickets=tickets, deadline=None)


def _set_ticket(state: Round, ticket: Ticket) -> Round:
    return replace(state, tickets=state.tickets.with_changed(ticket))
