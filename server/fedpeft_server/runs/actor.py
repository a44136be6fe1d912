"""The actor of one run: its commands one after another, and its transitions, each written in one transaction.

What it knows of the run is a copy of the database at a revision. A transition that begins at an older revision is not
written, and is decided again on what the database has now; a call is refused only where the copy is the newest. So any
number of servers may drive a run, and each transition happens once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import structlog

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable, FedpeftError, RunNotFound
from fedpeft.identity.audit import Detail
from fedpeft.rounds.conduct import Conduct
from fedpeft.rounds.events import (
    Event,
    Paused,
    Refused,
    Resumed,
    Stopped,
    TimePassed,
    Waiting,
    Withdrawn,
)
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.transitions import Changes, RunState, RunStatus, transition
from fedpeft_server.runs import audit_trail
from fedpeft_server.store.rows import SERVER, AuditEvent, RevisionMoved, RunRow, Transition
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import TaskSet, ended
from fedpeft_server.traffic import ByteCounter

log = structlog.get_logger()

R = TypeVar("R")

_NOW = {RunState.PAUSED: "paused", RunState.RUNNING: "resumed", RunState.STOPPED: "stopped"}

ATTEMPTS = 100
"""A command gives up after so many transitions of others in a row that came before its own."""

Decide = Callable[[RunStatus], Awaitable[Transition | None]]
"""Returns the transition that a command makes of a status; None if there is nothing to change."""
Entered = Callable[[RunStatus, Mapping[str, Conduct], bool], None]
"""Told the status before the one that is known now, the conduct of clients, and False if others made what lies between.
"""


class RunActor:
    """The commands of one run: each begins once the one before has ended. A run that has none costs nothing.

    A command is a task of its own that waits for the one before, so it has the context of its caller.

    Args:
        run: The run as the database has it.
        current: Its round in progress.
        store: The database.
        byte_counter: Bytes of the run, which are written with its transitions.
        entered: Called after every change of what is known of the run.

    Attributes:
        tasks: The commands, and other work of the run, until they end.
    """

    def __init__(self, run: RunRow, current: Round, store: Store, byte_counter: ByteCounter, entered: Entered) -> None:
        self.run = run
        self.round = current
        self.tasks = TaskSet()
        self._store = store
        self._byte_counter = byte_counter
        self._entered = entered
        self._last: asyncio.Task[Any] | None = None
        self._log = log.bind(run=run.id)

    @property
    def status(self) -> RunStatus:
        """The status of the run as far as it is known here."""
        run = self.run
        return RunStatus(run.revision, run.state, run.reason, run.version, self.round)

    async def call(self, command: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Returns the result of a command, which goes to its end even if the caller is cancelled."""
        self._last = task = self.tasks.start(self._run(self._last, command))
        return await ended(task)

    async def _run(self, previous: asyncio.Task[Any] | None, command: Callable[[], Coroutine[Any, Any, R]]) -> R:
        if previous is not None:
            await asyncio.wait({previous})
        del previous  # or each command would keep all those before it
        try:
            return await command()
        finally:
            if self._last is asyncio.current_task():
                self._last = None

    def changes(self, status: RunStatus, *events: Event) -> Changes | None:
        """Returns what events change now; see `fedpeft.rounds.transitions`."""
        return transition(status, events, self.run.config.rounds, self._store.clock.time())

    async def transit(self, decide: Decide, *, sure: bool = True) -> Transition | None:
        """Makes the transition that is decided on, in a command; returns it, or None if there is nothing to change.

        With `sure` the database is asked for the revision before there is found to be nothing to change, or the run not
        to allow it.

        Raises:
            DatabaseLocked: If others change the run all the time.
            FedpeftError: What `decide` raises, or the transaction.
        """
        for _ in range(ATTEMPTS):
            try:
                made = await decide(self.status)
            except FedpeftError:
                if sure and await self.refresh():
                    continue
                raise
            if made is None and not (sure and await self.refresh()):
                return None
            if made is not None and await self._write(made):
                return made
        raise DatabaseLocked(f"{self.run.id} was changed by other servers {ATTEMPTS} times in a row; try again")

    async def advance(self, event: Event, action: str = "", by: str = SERVER, epoch: int = 0) -> Transition | None:
        """Makes the transition of an event, in a command; returns None if the event changes nothing.

        The audit log is told that `by` did `action` to the ticket of the event, or the new state of the run.

        Raises:
            LeaseLost: If another daemon has taken the lease of the run since it had `epoch`, where that is given.
        """

        async def decide(status: RunStatus) -> Transition | None:
            changes = self.changes(status, event)
            said = _audit_events(changes, event, action, by) if changes else ()
            return Transition(changes, audit_events=said, epoch=epoch) if changes else None

        made = await self.transit(decide, sure=not isinstance(event, Waiting | TimePassed))  # which come again
        if made and _is_of_run(made.changes, event):
            after = made.changes.after
            say = self._log.warning if after.state is RunState.PAUSED and by == SERVER else self._log.info
            say("run " + after.state, reason=after.reason)
        return made

    def presume(self, state: RunState, reason: str) -> None:
        """Makes a state the known one that could not be written; a restart does not know it."""
        self._enter(replace(self.status, state=state, reason=reason), {}, here=True)

    async def _write(self, made: Transition) -> bool:
        """Writes a transition, with the bytes counted for the run; returns False if the run is at another revision."""
        try:
            await self._byte_counter.hand_out(self._store, partial(self._store.db.transit, made), self.run.id)
        except RevisionMoved:
            await self._reload()
            return False
        self._enter(made.changes.after, made.conducts, here=True)
        return True

    async def refresh(self) -> bool:
        """Reads the run again, in a command, if the database has another revision of it; False if it has not.

        Raises:
            RunNotFound: If it was deleted, though another run may have its id since.
            DatabaseUnavailable: If the database has an older state; see `pause_older`.
        """
        if await self._store.transact(self._store.db.revision, self.run.id) == self.run.revision:
            return False
        await self._reload()
        return True

    async def _reload(self) -> None:
        ((run, current),) = await self._store.transact(self._store.db.standings, self.run.id)
        if run.created_at != self.run.created_at:  # the part of a parent's run, which was made anew
            raise RunNotFound(f"{run.id} was deleted, and another run has its id since")
        if run.revision < self.run.revision:
            raise DatabaseUnavailable(f"the database has an older state of {self.run.id} than before; try again later")
        conducts = await self._store.transact(self._store.db.poor_conducts, self.run.id)
        self._log.info("run changed by another server", revision=run.revision, round=current.number)
        self._enter(RunStatus(run.revision, run.state, run.reason, run.version, current), conducts, here=False)

    async def pause_older(self) -> bool:
        """Pauses the run in the database, in a command, if that has an older state of it than is known here.

        What is known here stays what it was, and is of no use any more. Returns False if the state is not older.

        Raises:
            RunNotFound: If the run was deleted.
        """
        ((run, current),) = await self._store.transact(self._store.db.standings, self.run.id)
        if run.created_at != self.run.created_at or run.revision >= self.run.revision:
            return False
        if run.state is RunState.RUNNING:
            reason = (
                f"the database is older than it was: it had version {self.run.version} of this run at revision "
                f"{self.run.revision}, and has version {run.version} at revision {run.revision} (a standby that "
                "lagged, or a backup, in its place?); updates received and rounds committed since are lost to it: "
                "bring the newer database back, or resume the run to go on without them"
            )
            event, status = Paused(reason), RunStatus(run.revision, run.state, run.reason, run.version, current)
            if changes := self.changes(status, event):
                if changes.after.revision == self.run.revision:  # others would take what they know for this
                    changes = replace(changes, after=replace(changes.after, revision=self.run.revision + 1))
                paused = Transition(changes, audit_events=_audit_events(changes, event, "", SERVER))
                with suppress(RevisionMoved):  # another server pauses it at this moment, or goes on with what there is
                    await self._store.transact(self._store.db.transit, paused)
                    self._log.error("run paused", reason=reason)
        return True

    def _enter(self, after: RunStatus, conducts: Mapping[str, Conduct], *, here: bool) -> None:
        before, self.round = self.status, after.round
        self.run = replace(
            self.run, revision=after.revision, state=after.state, reason=after.reason, version=after.version
        )
        self._entered(before, conducts, here)


def _audit_events(changes: Changes, event: Event, action: str, by: str) -> list[AuditEvent]:
    before, after = changes.before.round, changes.after
    if _is_of_run(changes, event):
        details: dict[str, Detail] = {"reason": after.reason, "round": before.number}
        return [AuditEvent(by, f"run.{_NOW[after.state]}", before.run, details)]
    if isinstance(event, Refused | Withdrawn):
        return [audit_trail.of_ticket(before, before.ticket(event.ticket), action, event.reason, by)]
    return []


def _is_of_run(changes: Changes, event: Event) -> bool:
    """Returns True if an event is about the state of the run, or changes it."""
    return isinstance(event, Paused | Resumed | Stopped) or changes.before.state is not changes.after.state
