"""One run's engine: the commands that callers and the clock give a run, and what follows from each of its transitions.

Its actor orders the commands, and makes the transitions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import asynccontextmanager, suppress
from functools import partial

import structlog

from fedpeft.errors import (
    BlobCorrupt,
    DatabaseUnavailable,
    FedpeftError,
    TicketNotFound,
    VersionBeingMade,
    VersionNotFound,
)
from fedpeft.identity.audit import Detail
from fedpeft.privacy.round_privacy import round_privacy_of
from fedpeft.privacy.statement import EPSILON
from fedpeft.rounds import conduct, events
from fedpeft.rounds.metric_values import ROLLED_BACK_TO
from fedpeft.rounds.state_machine import Phase, Round, policy_of
from fedpeft.rounds.tickets import Ticket, TicketState
from fedpeft.rounds.transitions import ACTIVE, RunStatus, changes, effects
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs import receipts
from fedpeft_server.runs.actor import RunActor
from fedpeft_server.runs.aggregation import Folding, go_back, way_back
from fedpeft_server.runs.gauges import RunGauges
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.runs.participation import Participation
from fedpeft_server.runs.receipts import Receipt
from fedpeft_server.runs.round_log import RoundLog
from fedpeft_server.store.rows import FOUND, SERVER, AuditEvent, RunRow, RunState, Transition, UpdateRow, VersionRow
from fedpeft_server.store.store import NewVersion, Store
from fedpeft_server.tasks import shielded
from fedpeft_server.timing import Timing
from fedpeft_server.traffic import ByteCounter

log = structlog.get_logger()


class RunEngine:
    """Drives one run from round to round.

    Args:
        run: The run as the database has it.
        current: Its round in progress.
        store: Database, blobs and spool.
        lobby: Lobby that is called when tickets are issued.
        answers: Answers of clients, and their use of tickets.
        byte_counter: Bytes of the round.
        metrics: Metrics in which events are counted.
        background: Watches over what no call waits for.
        issued: Told the run and the tickets that are given out.
        changed: Called after every transition, so that other runs and watchers look again.
        timing: Pauses before a deadline or a fold that the database did not allow is tried again.
        versioned: Called once a version was made here.

    Attributes:
        opened: Time at which it sampled last.
        is_offered: True while it has yet to sample from an offer: it sees who waits by then, and needs no other one.
    """

    def __init__(
        self,
        run: RunRow,
        current: Round,
        store: Store,
        lobby: Lobby,
        answers: Participation,
        byte_counter: ByteCounter,
        metrics: Metrics,
        background: Background,
        issued: Callable[[str, Sequence[Ticket]], None],
        changed: Callable[[RunEngine], None],
        timing: Timing,
        versioned: Callable[[str], None] = lambda run: None,
    ) -> None:
        self.opened = 0.0
        self.is_offered = False
        self.actor = RunActor(run, current, store, byte_counter, self._entered)
        self.tasks = self.actor.tasks
        self._store = store
        self._lobby = lobby
        self._participation = answers
        self._byte_counter = byte_counter
        self._metrics = metrics
        self._background = background
        self._issued = issued
        self._changed = changed
        self._versioned = versioned
        self._timing = timing
        self._waiting: list[Receipt] = []
        self._moved = asyncio.Event()  # set at the next change of the run
        self._corrupt: set[tuple[int, str]] = set()
        """Versions of which the audit log was told that they are corrupt, and the words; once is enough."""
        self._timer: asyncio.TimerHandle | None = None
        self._log = log.bind(run=run.id)
        self._round_log = RoundLog(run.id, metrics)
        self.folding = Folding(self.actor, store, background, self._round_log, timing)
        if self.active:  # nothing will be counted for the others, which stay for months
            metrics.begin(run.id)
        if not policy_of(run.config.rounds).one_version:
            byte_counter.show_as_they_pass(run.id)
        self._gauges = RunGauges(metrics)
        self._gauges.show(run, current)
        self._arm_timer()

    @property
    def run(self) -> RunRow:
        """The run as far as it is known here."""
        return self.actor.run

    @property
    def round(self) -> Round:
        """Its round in progress; the last one where the run is over."""
        return self.actor.round

    @property
    def age(self) -> tuple[float, str]:
        """Time of the run's creation, and its id: runs are listed in this order."""
        return self.run.created_at, self.run.id

    @property
    def active(self) -> bool:
        """True if rounds are left to be held."""
        return self.run.state in ACTIVE

    def open_ticket(self, client: str) -> Ticket | None:
        """Returns the ticket a client can use now."""
        ticket = self.round.ticket_of(client) if self.active else None
        return ticket if ticket and self.round.is_usable(ticket) else None

    def awaited(self) -> tuple[Ticket, ...]:
        """Returns the tickets that can be used now."""
        issued = self.round.in_state(TicketState.ISSUED) if self.active else ()
        return tuple(ticket for ticket in issued if self.round.is_usable(ticket))

    async def start(self) -> None:
        """Takes up the run where the last process left it."""
        may_differ = round_privacy_of(self.run.config).central or (self._store.db.is_shared and self.active)
        if not policy_of(self.run.config.rounds).makes_versions or (may_differ and self.run.version):
            self.folding.forget_uncommitted(self.run.version)
        if self.actor.status.folds:
            self._log.info("aggregation resumed", round=self.round.number)
            self.folding.begin()

    async def close(self) -> None:
        """Lets an aggregation in progress finish and stops the clock."""
        self._disarm_timer()
        self.folding.drain()
        await self.tasks.wait()
        await self.folding.idle()
        self._disarm_timer()
        await self.tasks.wait()  # the removal of a committed round's files is one

    async def refresh(self) -> bool:
        """Takes over what another server has changed since this engine last looked; returns False if nothing was."""
        return await self.actor.call(self.actor.refresh)

    async def offer(self, clients: AbstractSet[str], waited_s: float) -> None:
        """Lets the run sample from the clients that wait; for so long at least a quorum has."""
        if self.run.state is not RunState.RUNNING:
            return
        poor = conduct.Demerits(self._participation.conducts(self.run.id), self.round.number)
        waiting = events.Waiting(clients, poor, waited_s)
        if self.actor.changes(self.actor.status, waiting):  # as a rule there are none
            self.is_offered = True
            try:
                await self.actor.call(lambda: self.actor.advance(waiting))
            finally:
                self.is_offered = False

    async def receive(self, update: UpdateRow, by: str) -> UpdateRow:
        """Counts a durable update that `by` sent; one that was counted before is returned as it was then.

        One that comes while a version is being made, and counts in the next one, waits for that.

        Raises:
            VersionBeingMade: If the run was paused, or the server is shutting down, before that version was there.
            RoundClosed: If the round takes nothing more, or the run was stopped.
            TicketClosed: If the ticket was withdrawn or refused.
            UpdateDiffers: If another update was counted for the ticket.
        """
        while True:
            moved, receipt = self._moved, Receipt(update, by)
            self._waiting.append(receipt)
            try:
                return await self.actor.call(partial(self._receive, receipt))
            except VersionBeingMade:
                if self.run.state is not RunState.RUNNING or self._lobby.is_closed:
                    raise
            with suppress(TimeoutError):  # another server may have made it
                async with asyncio.timeout(self._timing.base_version_look_s):
                    await moved.wait()

    async def _receive(self, receipt: Receipt) -> UpdateRow:
        """Counts all updates that wait in one transaction, unless an earlier command has counted this one too."""
        if not receipt.counted.done():
            waiting, self._waiting = self._waiting, []
            try:
                await self._count(waiting)
            except Exception as error:
                receipts.fail(waiting, error)
            except BaseException:
                receipts.fail(waiting, None)
                raise
        return receipt.counted.result()

    async def _count(self, waiting: Sequence[Receipt]) -> None:
        found = receipts.Batch(None, (), (), ())

        async def decide(status: RunStatus) -> Transition | None:
            nonlocal found
            found = receipts.batch(status, waiting, self.run.config.rounds, self._store.clock.time())
            return found.transition()

        made = await self.actor.transit(decide)
        for update in made.updates if made else ():
            state = found.changes.round if found.changes else self.round
            ticket = state.ticket(update.ticket)
            stale = state.staleness(ticket)
            self._metrics.received(self.run.id, update.norm, update.metrics, stale)
            facts = {"client": ticket.client, "examples": update.examples, **({"staleness": stale} if stale else {})}
            self._log.info("update received", round=state.number, **facts)
        await found.settle(self._store)

    @shielded
    async def refuse(self, ticket: Ticket, error: FedpeftError, by: str) -> None:
        """Closes a ticket for which `by` sent what is wrong for good; the round goes on with the others."""
        self._store.soon(self._store.updates.remove_partial, ticket.id)
        words = f"{error.reason}: {error.message}"
        event = events.Refused(ticket.id, words)
        with suppress(TicketNotFound):  # its round is over, and with it the ticket
            if await self.actor.call(lambda: self.actor.advance(event, "update.refused", by)):
                self._metrics.updates.labels(self.run.id, "refused").inc()
                self._log.warning("update refused", client=ticket.client, reason=error.reason, message=error.message)

    async def withdraw(self, ticket: Ticket, reason: str, by: str) -> TicketState:
        """Closes a ticket that `by`, its client as a rule, gives up; returns its state now.

        Raises:
            TicketNotFound: If its round is over.
        """
        return await self.actor.call(lambda: self._withdraw(ticket, reason, by))

    async def _withdraw(self, ticket: Ticket, reason: str, by: str) -> TicketState:
        if await self.actor.advance(events.Withdrawn(ticket.id, reason), "ticket.withdrawn", by):
            self._log.info("ticket withdrawn", client=ticket.client, reason=reason)
        self._store.soon(self._store.updates.remove_partial, ticket.id)
        return self.round.ticket(ticket.id).state

    async def pause(self, reason: str, by: str) -> None:
        """Lets no new round open; `by` is who asked for it."""
        event = events.Paused(reason or "paused by the operator")
        await self.actor.call(lambda: self.actor.advance(event, by=by))

    @asynccontextmanager
    async def noting_corruption(self, version: int) -> AsyncIterator[None]:
        """Records in the block that the file of a version is missing or corrupt; pauses the run if it is the newest.

        Raises:
            VersionRemoved: If the retention has removed it meanwhile.
        """
        try:
            yield
        except BlobCorrupt as error:
            await self._store.transact(self._store.db.retention.version, self.run.id, version)
            with self._background.attempt("files", self.run.id):
                await self._note_corrupt(version, error)
            raise

    @shielded
    async def _note_corrupt(self, version: int, error: BlobCorrupt) -> None:
        if version == self.run.version and self.run.state is RunState.RUNNING:
            cure = "; then resume the run" + (f", or {way_back(self.run)}" if version else "")
            reason = f"version {version} is not what was stored{FOUND}{error.message}{cure}"
            if await self.actor.call(lambda: self.actor.advance(events.Paused(reason))):
                self._metrics.rounds.labels(self.run.id, "paused").inc()
            return
        if (version, error.message) in self._corrupt or self.run.state is RunState.PAUSED:
            return
        self._corrupt.add((version, error.message))
        said = AuditEvent(SERVER, "version.corrupt", self.run.id, {"version": version, "reason": error.message})
        await self._store.transact(self._store.db.transactions.write, said)

    async def resume(self, by: str) -> None:
        """Lets rounds open again, a round out of extensions with a fresh deadline; `by` is who asked for it."""
        await self.actor.call(lambda: self.actor.advance(events.Resumed(), by=by))

    @shielded
    async def stop(self, reason: str, by: str) -> None:
        """Ends the run for good; an aggregation in progress is let go; `by` is who asked for it."""
        event = events.Stopped(reason or "stopped by the operator")
        if made := await self.actor.call(lambda: self.actor.advance(event, by=by)):
            self._metrics.rounds.labels(self.run.id, "stopped").inc()
            if made.changes.round.stopped:  # else it is committed, and what is kept of it stays
                self._background.watch("files", self.tasks.start(self.folding.forget_stopped(made.changes.round)))

    @shielded
    async def readmit(self, client: str, by: str) -> None:
        """Lets a client back that was set aside; `by` is who asked for it."""
        good = {client: conduct.GOOD}
        said = (AuditEvent(by, "client.readmitted", self.run.id, {"client": client}),)

        async def decide(status: RunStatus) -> Transition:
            same = changes(status, status, self.run.config.rounds, self._store.clock.time())
            return Transition(same, conducts=good, audit_events=said)

        await self.actor.call(lambda: self.actor.transit(decide))
        self._log.info("client readmitted", client=client)

    @shielded
    async def roll_back(self, to: int, reason: str, by: str) -> None:
        """Takes the run back to the tensors and the state of an earlier version, as a new one that `by` asked for.

        The round in progress is over with it: what was trained for it began with what is taken back. A run that
        went back to this version last stays as it is.

        Raises:
            RunFinished: If the run is completed or stopped.
            VersionNotFound: If there is no such version, or it is the newest.
            VersionRemoved: If the retention has removed it.
        """
        await self.folding.idle()  # its version comes before, as a rule

        async def decide(status: RunStatus) -> Transition | None:
            return await self._rolled_back(status, to, reason, by)

        if made := await self.actor.call(lambda: self.actor.transit(decide)):
            number = made.changes.after.version
            self._metrics.rounds.labels(self.run.id, "rolled_back").inc()
            self._log.warning("run rolled back", to=to, version=number, reason=reason)
            self._background.watch("files", self.tasks.start(self.folding.forget(made.changes.round)))

    async def check_supply(self, version: int) -> None:
        """Checks whether a version of the parent's server would be taken over, before it is received.

        Raises:
            FedpeftError: As `supply`.
        """

        async def decide(status: RunStatus) -> Transition | None:
            self.actor.changes(status, events.Supplied(version))
            return None

        await self.actor.call(lambda: self.actor.transit(decide))

    @shielded
    async def supply(self, new: NewVersion, stored: Callable[[], VersionRow], by: str) -> None:
        """Takes over a version of the parent's server that `by` brings, and begins the round after it.

        A round that is not over goes with all that came for it; a version that is here already changes nothing. The
        upload is removed at the end: its caller may have left long ago.

        Args:
            new: The version.
            stored: Stores it as a blob.
            by: The caller.

        Raises:
            RunNotRelayed: If the run makes its versions itself.
            RunFinished: If the run is completed or stopped.
            VersionSuperseded: If the run has a later version.
            VersionNotFound: If it has fewer rounds.
        """

        async def decide(status: RunStatus) -> Transition | None:
            changes = self.actor.changes(status, events.Supplied(new.version))
            details: dict[str, Detail] = {"version": new.version, "adapter_sha256": row.sha256}
            said = AuditEvent(by, "version.supplied", self.run.id, details)
            return Transition(changes, supplied=row, audit_events=(said,)) if changes else None

        try:
            row = await self._store.version(stored)  # before the command: others wait for the end of that
            made = await self.actor.call(lambda: self.actor.transit(decide))
        except Exception as error:
            if not isinstance(error, DatabaseUnavailable):  # else it may be in the database
                await self._store.version(self._store.undo, new)
            raise
        finally:
            self._store.soon(self._store.updates.remove_all, (new.spool_key,))
        if made is None:  # another call brought it meanwhile
            with self._background.attempt("files", self.run.id):
                await self._store.version(self._store.undo, new)
            return
        self._log.info("version supplied", version=new.version)
        self._store.soon(self._store.forget_sums, self.run.id, new.version)
        if made.changes.round.stopped:
            self._background.watch("files", self.tasks.start(self.folding.forget_stopped(made.changes.round)))

    @shielded
    async def differs(self, reason: str, by: str) -> None:
        """Pauses the run, whose newest version is not the parent's of that number; a completed one has it for a reason.

        Args:
            reason: A sentence that says so.
            by: The caller that brought the parent's version.
        """

        async def decide(status: RunStatus) -> Transition | None:
            changes = self.actor.changes(status, events.Differed(reason))
            details: dict[str, Detail] = {"version": status.version, "reason": reason}
            said = AuditEvent(by, "version.differs", self.run.id, details)
            return Transition(changes, audit_events=(said,)) if changes else None

        if made := await self.actor.call(lambda: self.actor.transit(decide)):
            self._log.error("the newest version is not the parent's", version=made.changes.after.version, cause=reason)
            if made.changes.after.state is RunState.PAUSED:
                self._metrics.rounds.labels(self.run.id, "paused").inc()

    async def _rolled_back(self, status: RunStatus, to: int, reason: str, by: str) -> Transition | None:
        """Stores the next version, which is an earlier one; returns the transition, None if it was made last."""
        changes = self.actor.changes(status, events.RolledBack(to))
        db, run, version = self._store.db, self.run.id, status.version
        newest = await self._store.transact(db.round_with, run, version, (), {})
        if changes is None or (newest and newest.metrics.get(ROLLED_BACK_TO) == to):
            return None
        if to >= version:
            raise VersionNotFound(f"{run} is at version {version}; it can go back to an earlier one, not to {to}")
        source = await self._store.transact(db.retention.version, run, to)
        base = await self._store.transact(db.version, run, version)
        previous = await self._store.transact(db.record_sha256, run, version)
        number = changes.round.number
        spent = newest.metrics.get(EPSILON) if newest else None
        result = await self._store.version(go_back, self.run, number, source, base, previous, self._store, spent)
        details: dict[str, Detail] = {"to": to, "version": number, "reason": reason}
        details["record_sha256"] = result.outcome.record_sha256
        return Transition(changes, result=result, audit_events=(AuditEvent(by, "run.rolled_back", run, details),))

    def _entered(self, before: RunStatus, conducts: Mapping[str, conduct.Conduct], here: bool) -> None:
        """Does what follows from a change of the run, whoever made it."""
        self._moved.set()
        self._moved = asyncio.Event()
        run, current, follow = self.run, self.round, effects(before, self.actor.status)
        if here:  # else the server that made the transition has counted and logged it
            self._round_log.entered(before.round, current, self._store.clock.time())
        else:  # of these clients alone it is not good
            conducts = {**dict.fromkeys(self._participation.conducts(run.id), conduct.GOOD), **conducts}
            if before.round.number != current.number or follow.ended:
                self._background.watch("files", self.tasks.start(self.folding.forget_here(before.round, current)))
        self._participation.put_conducts(run.id, conducts)
        if follow.committed:
            self._byte_counter.round_committed(run.id, run.version)
            if here:
                self._versioned(run.id)
        self._arm_timer()
        if follow.issued:
            self.opened = self._store.clock.time()
            self._issued(run.id, follow.issued)
            for ticket in follow.issued:
                (self._lobby.wake_sampled if here else self._lobby.wake)(ticket.client)
        if follow.fold:
            self.folding.begin()
        self._gauges.show(run, current)
        self._changed(self)
        if follow.ended:
            self._lobby.wake_all()
        elif follow.committed:
            self._lobby.wake_evaluators()

    async def _deadline(self) -> None:
        """Acts on the deadline; and looks again where that failed, or where the clock was set back meanwhile."""
        pause_s = self._timing.deadline_retry_s
        with self._background.attempt("deadline", self.run.id):
            made = await self.actor.call(lambda: self.actor.advance(events.TimePassed()))
            if made and made.changes.after.state is RunState.PAUSED:
                self._metrics.rounds.labels(self.run.id, "paused").inc()
            pause_s = 0.0
        self._arm_timer(pause_s)

    def _arm_timer(self, least_s: float = 0.0) -> None:
        self._disarm_timer()
        if self.run.state is not RunState.RUNNING:
            return
        if self.round.deadline is not None:
            left_s = self.round.deadline - self._store.clock.time()
        elif self.round.phase is Phase.WAITING:  # as a rule it is open by then, and no deadline was written
            left_s = self._timing.waiting_look_s
        else:
            return
        self._timer = asyncio.get_running_loop().call_later(max(least_s, left_s), self._act_on_deadline)

    def _act_on_deadline(self) -> None:
        self._background.watch("deadline", self.tasks.start(self._deadline()))

    def _disarm_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
