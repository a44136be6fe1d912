"""Transitions of a run, pure: ``(status at a revision, events) -> changes``, which lead to the next revision.

A run has a revision, which each transition raises by one. Whoever keeps runs writes the changes in one transaction that
fails if the revision moved meanwhile, then reads the run again and asks here again: so each transition happens once,
whoever tries, and what a process holds in memory is a copy that may be old.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum

from fedpeft.config import RoundsConfig
from fedpeft.errors import RunFinished, RunNotRelayed, RunRelayed, VersionNotFound, VersionSuperseded
from fedpeft.formatting import counted
from fedpeft.rounds.events import (
    Aggregated,
    Differed,
    Event,
    Pause,
    Paused,
    Resumed,
    RolledBack,
    Stopped,
    Supplied,
    TimePassed,
    Waiting,
)
from fedpeft.rounds.state_machine import Phase, Round, advance, policy_of
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState


class RunState(StrEnum):
    """State of a run."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    STOPPED = "stopped"


ACTIVE = (RunState.RUNNING, RunState.PAUSED)
"""The states in which rounds are left to be held."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The part of a run that transitions change, at a revision.

    Attributes:
        revision: Number of transitions before.
        state: State of the run.
        reason: Reason of that state, in a sentence; may be empty.
        version: Newest committed adapter version.
        round: The round in progress; the last one where the run is over.
    """

    revision: int
    state: RunState
    reason: str
    version: int
    round: Round

    @property
    def is_active(self) -> bool:
        """True if rounds are left to be held."""
        return self.state in ACTIVE

    @property
    def folds(self) -> bool:
        """True if the round in progress is to be folded."""
        return self.is_active and self.round.phase is Phase.AGGREGATING

    @property
    def awaited_version(self) -> int | None:
        """The version that a parent's server must supply before the run goes on; None if it need not.

        After the last round that is the last version, with which the run is completed.
        """
        needed = self.round.number if self.round.phase is Phase.COMMITTED else self.round.base_version
        return needed if self.is_active and self.version < needed else None


@dataclass(frozen=True, slots=True)
class Effects:
    """Consequences of a status in place of another one, whoever made the transitions between.

    Attributes:
        issued: Tickets that can be used, and are new or given out again.
        fold: True if the round is to be folded from now on.
        committed: True if there is a newer version.
        ended: True if the run is over since then.
    """

    issued: tuple[Ticket, ...]
    fold: bool
    committed: bool
    ended: bool


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes of a transition, as they are written.

    Attributes:
        before: The status that it begins at.
        after: The status that it leads to.
        round: The round that it writes; where it commits a round, that one, and `after` has the one that follows.
        writes_round: False if nothing of the round changes but tickets.
        tickets: The tickets that are new, or changed.
        uncounted: Clients whose updates had been received and do not count any more.
        again: Ids of their tickets that were given out again: what was received for them is not there any more.
        replaced: Closed tickets of earlier rounds in whose place their clients have new ones.
    """

    before: RunStatus
    after: RunStatus
    round: Round
    writes_round: bool
    tickets: tuple[Ticket, ...]
    uncounted: tuple[str, ...]
    again: tuple[str, ...] = ()
    replaced: tuple[Ticket, ...] = ()

    @property
    def begun(self) -> Round | None:
        """The round that follows, where it has tickets of the one that is committed: they are in it from now on."""
        following = self.after.round
        return following if following.number != self.round.number and following.tickets else None


def transition(status: RunStatus, events: Iterable[Event], config: RoundsConfig, now: float) -> Changes | None:
    """Returns the changes of events that happen together, one after the other, at time `now`; None if there are none.

    Raises:
        RunFinished: If a run that is over is to be paused, resumed, stopped or rolled back.
        FedpeftError: As `state_machine.advance`.
    """
    after = status
    for event in events:
        after = _after(after, event, config, now)
    return None if after is status else changes(status, after, config, now)


def changes(before: RunStatus, after: RunStatus, config: RoundsConfig, now: float) -> Changes:
    """Returns what leads from a status to another one of the same round; its revision is the next in any case."""
    changed = list(after.round.tickets.changes_since(before.round.tickets))
    revoked = [new for old, new in changed if old is not None and old.state is TicketState.RECEIVED]
    uncounted = tuple(ticket.client for ticket in revoked)
    again = tuple(ticket.id for ticket in revoked if ticket.state is TicketState.ISSUED)
    is_other = (before.state, before.reason, before.version) != (after.state, after.reason, after.version)
    writes = is_other or before.round.without_tickets != after.round.without_tickets
    held = (before.round.ticket_of(new.client) for old, new in changed if old is None or old.id != new.id)
    replaced = tuple(old for old in held if old is not None and after.round.tickets.find(old.id) is None)
    current = in_progress(after.round, after.version, config, now, active=after.is_active)
    if after.state is RunState.PAUSED and current is not after.round:
        current = replace(current, deadline=None)
    moved = replace(after, revision=before.revision + 1, round=current)
    new_tickets = tuple(new for _, new in changed)
    return Changes(before, moved, after.round, writes, new_tickets, uncounted, again, replaced)


def in_progress(newest: Round, version: int, config: RoundsConfig, now: float, *, active: bool) -> Round:
    """Returns the round that a run is in, given its newest one: after a committed round the next, if there is one.

    Where a parent's run went on without this one, it is the round after the newest version. The last one stays while
    the parent's version of that number is awaited.
    """
    if not active or (newest.phase is Phase.COMMITTED and newest.number >= config.count):
        return newest
    current = newest.following(config, now) if newest.phase is Phase.COMMITTED else newest
    return current if version <= current.base_version else Round(current.run, version + 1)


def effects(before: RunStatus, after: RunStatus) -> Effects:
    """Returns what follows from a status in place of another one."""
    usable = after.is_active and after.round.phase is Phase.OPEN
    resumed = before.state is RunState.PAUSED and after.state is RunState.RUNNING
    newly = not before.folds or before.round.number != after.round.number
    return Effects(
        _issued(before.round.tickets, after.round.tickets) if usable else (),
        after.folds and (newly or resumed),
        after.version > before.version,
        before.is_active and not after.is_active,
    )


def _issued(before: Tickets, after: Tickets) -> tuple[Ticket, ...]:
    if not after.has_gained(before):
        return ()
    return tuple(t for t in after if t.state is TicketState.ISSUED and not _was_out(before.find(t.id)))


def _supplied(status: RunStatus, version: int, config: RoundsConfig, now: float) -> RunStatus:
    run = status.round.run
    if policy_of(config).makes_versions:
        raise RunNotRelayed(f"{run} makes its versions itself; they are supplied to runs of a parent's server alone")
    if version < status.version:
        raise VersionSuperseded(f"{run} has version {status.version} by now; version {version} comes too late")
    if version == status.version:
        return status
    if not status.is_active:
        raise RunFinished(f"{run} is {status.state}: it takes no version any more")
    if version > config.count:
        raise VersionNotFound(f"{run} has {counted(config.count, 'round')}, and no version {version}")
    closed, _ = advance(status.round, Supplied(version), config, now)
    if closed.phase is Phase.WAITING and closed.number <= version:  # nobody has begun it: it leaves nothing behind
        closed = Round(run, min(version + 1, config.count))
    after = replace(status, version=version, round=closed)
    return replace(after, state=RunState.COMPLETED, reason="") if version >= config.count else after


def _was_out(ticket: Ticket | None) -> bool:
    return ticket is not None and ticket.state is TicketState.ISSUED


def _after(status: RunStatus, event: Event, config: RoundsConfig, now: float) -> RunStatus:
    match event:
        case Waiting() | TimePassed() if status.state is not RunState.RUNNING or status.awaited_version is not None:
            return status
        case Stopped() if status.state is RunState.STOPPED:
            return status
        case Differed(reason) if status.state is not RunState.RUNNING:  # a completed run has a reason where this is so
            is_news = status.state is RunState.COMPLETED and status.reason != reason
            return replace(status, reason=reason) if is_news else status
        case Paused() | Resumed() | Stopped() | RolledBack() if not status.is_active:
            text = "it cannot be paused, resumed, stopped or rolled back any more"
            raise RunFinished(f"{status.round.run} is {status.state}: {text}")
        case RolledBack() if not policy_of(config).makes_versions:
            raise RunRelayed(
                f"the versions of {status.round.run} come from its parent's server: roll the run back there"
            )
        case Supplied(version):
            return _supplied(status, version, config, now)
    new, follow = advance(status.round, event, config, now)
    after = status if new is status.round else replace(status, round=new)
    match event:
        case Paused(reason) | Differed(reason):
            after = replace(after, state=RunState.PAUSED, reason=reason)
        case Resumed():
            after = replace(after, state=RunState.RUNNING, reason="")
        case Stopped(reason):
            after = replace(after, state=RunState.STOPPED, reason=reason)
        case Aggregated() | RolledBack() if new is not status.round:
            if policy_of(config).makes_versions:
                after = replace(after, version=new.number)
                if new.number >= config.count:
                    after = replace(after, state=RunState.COMPLETED, reason="")
    for effect in follow:
        if isinstance(effect, Pause):
            after = replace(after, state=RunState.PAUSED, reason=effect.reason)
    if after.state is RunState.PAUSED and after.round.deadline is not None:  # its round opened again meanwhile
        after = replace(after, round=replace(after.round, deadline=None))
    return after
