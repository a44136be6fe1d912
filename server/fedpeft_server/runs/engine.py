"""One run's engine: feeds events to the pure round, writes each new state in one transaction, and does what follows.

The lock makes transitions of a run follow one another; who holds it sees `run` and `round` as the database has them.
A transition that was begun goes to its end, also when the call that asked for it is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace
from functools import partial

import structlog

from fedpeft.errors import (
    DatabaseLocked,
    DatabaseUnavailable,
    DiskFull,
    FedpeftError,
    RunFinished,
    TicketNotFound,
    VersionNotFound,
)
from fedpeft.identity.audit import Detail
from fedpeft.process import tracing
from fedpeft.rounds import conduct, screening, state_machine
from fedpeft.rounds.commit import RoundEmptied
from fedpeft.rounds.state_machine import Phase, Round, TicketState
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs import audit_trail, gauges, receipts
from fedpeft_server.runs.aggregation import Result, aggregate, go_back
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.runs.participation import Participation
from fedpeft_server.runs.receipts import Receipt
from fedpeft_server.runs.round_log import RoundLog
from fedpeft_server.runs.shielded import TaskSet, shielded
from fedpeft_server.store.rows import AuditEvent, RunRow, RunState, UpdateRow
from fedpeft_server.store.store import Store
from fedpeft_server.traffic import ByteCounter

log = structlog.get_logger()

ACTIVE = (RunState.RUNNING, RunState.PAUSED)

SERVER = "server"
"""The actor of what nobody asked for."""
_NOW = {RunState.PAUSED: "paused", RunState.RUNNING: "resumed", RunState.STOPPED: "stopped"}

AGAIN_S = 5.0
"""A deadline whose transition could not be written is tried again after this pause."""


class RunEngine:
    """Drives one run from round to round.

    Args:
        run: The run as the database has it.
        current: Its round in progress.
        store: Database, blobs and spool.
        lobby: Whom to call when tickets are issued.
        answers: What clients answered, and how they used their tickets.
        byte_counter: Bytes of the round.
        metrics: Where what happens is counted.
        background: Watches over what no call waits for.
        issued: Told the run and the tickets that are given out.
        changed: Called after every transition, so that other runs and watchers look again.
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
        issued: Callable[[str, Sequence[state_machine.Ticket]], None],
        changed: Callable[[RunEngine], None],
    ) -> None:
        self.run = run
        self.round = current
        self.opened = 0.0
        self._store = store
        self._lobby = lobby
        self._participation = answers
        self._byte_counter = byte_counter
        self._metrics = metrics
        self._background = background
        self._issued = issued
        self._changed = changed
        self._lock = asyncio.Lock()
        self._waiting: list[Receipt] = []
        self._timer: asyncio.TimerHandle | None = None
        self._folding: asyncio.Task[None] | None = None
        self._closing = False
        self.tasks = TaskSet()
        self._log = log.bind(run=run.id)
        self._round_log = RoundLog(run.id, metrics)
        if self.active:  # nothing will be counted for the others, which stay for months
            metrics.begin(run.id)
        gauges.show(metrics, run, current)

    @property
    def age(self) -> tuple[float, str]:
        """Time of the run's creation, and its id: runs are listed in this order."""
        return self.run.created_at, self.run.id

    @property
    def active(self) -> bool:
        """True if rounds are left to be held."""
        return self.run.state in ACTIVE

    def open_ticket(self, client: str) -> state_machine.Ticket | None:
        """Returns the ticket a client can use now."""
        ticket = self.round.ticket_of(client) if self.active else None
        usable = ticket and ticket.state is TicketState.ISSUED and self.round.phase is Phase.OPEN
        return ticket if usable else None

    def awaited(self) -> tuple[state_machine.Ticket, ...]:
        """Returns the tickets that can be used now."""
        now = self.active and self.round.phase is Phase.OPEN
        return self.round.in_state(TicketState.ISSUED) if now else ()

    async def start(self) -> None:
        """Takes up the run where the last process left it."""
        self._arm_timer()
        if self.active and self.round.phase is Phase.AGGREGATING:
            self._log.info("aggregation resumed", round=self.round.number)
            self._fold()

    async def close(self) -> None:
        """Lets an aggregation in progress finish and stops the clock."""
        self._closing = True
        self._disarm_timer()
        await self.tasks.wait()
        if self._folding:
            await asyncio.wait({self._folding})
        self._disarm_timer()
        await self.tasks.wait()  # the removal of a committed round's files is one

    @shielded
    async def offer(self, clients: AbstractSet[str], waited_s: float) -> None:
        """Lets the run sample from the clients that wait; for so long at least a quorum has."""
        if self.run.state is RunState.RUNNING:
            poor = conduct.demerits(self._participation.conducts(self.run.id), self.round.number)
            await self._advance(state_machine.Waiting(clients, poor, waited_s))

    @shielded
    async def receive(self, update: UpdateRow, by: str) -> UpdateRow:
        """Counts a durable update that `by` sent; one that was counted before is returned as it was then.

        Raises:
            RoundClosed: If the round takes nothing more, or the run was stopped.
            TicketClosed: If the ticket was withdrawn or refused.
        """
        receipt = Receipt(update, by)
        self._waiting.append(receipt)
        async with self._lock:
            if not receipt.counted.done():
                waiting, self._waiting = self._waiting, []
                await self._receive(waiting)
        return receipt.counted.result()

    async def _receive(self, waiting: Sequence[Receipt]) -> None:
        """Counts updates in one transaction, and gives each its receipt or its error."""
        try:
            batch = receipts.batch(self.round, waiting, self.run.config.rounds, time.time())
            if batch.new:
                updates = [receipt.update for receipt in batch.new]
                await self._write(self._store.db.receive, batch.round, updates, audit_events=batch.audit_events())
                for update in updates:
                    client = batch.round.ticket(update.ticket).client
                    self._metrics.received(self.run.id, update.norm, update.metrics)
                    self._log.info("update received", round=batch.round.number, client=client, examples=update.examples)
                self._enter(batch.round, batch.effects)
            await batch.settle(self._store)
        except Exception as error:
            receipts.fail(waiting, error)
        except BaseException:
            receipts.fail(waiting, None)
            raise

    @shielded
    async def refuse(self, ticket: state_machine.Ticket, error: FedpeftError, by: str) -> None:
        """Closes a ticket for which `by` sent what is wrong for good; the round goes on with the others."""
        self._store.soon(self._store.spool.remove_partial, ticket.id)
        with suppress(TicketNotFound):  # its round is over, and with it the ticket
            words = f"{error.reason}: {error.message}"
            if await self._advance(
                state_machine.Refused(ticket.id, words),
                audit_trail.of_ticket(self.round, ticket, "update.refused", words, by),
            ):
                self._metrics.updates.labels(self.run.id, "refused").inc()
                self._log.warning("update refused", client=ticket.client, reason=error.reason, message=error.message)

    @shielded
    async def withdraw(self, ticket: state_machine.Ticket, reason: str, by: str) -> TicketState:
        """Closes a ticket that `by`, its client as a rule, gives up; returns its state now.

        Raises:
            TicketNotFound: If its round is over.
        """
        if await self._advance(
            state_machine.Withdrawn(ticket.id, reason),
            audit_trail.of_ticket(self.round, ticket, "ticket.withdrawn", reason, by),
        ):
            self._log.info("ticket withdrawn", client=ticket.client, reason=reason)
        self._store.soon(self._store.spool.remove_partial, ticket.id)
        return self.round.ticket(ticket.id).state

    @shielded
    async def pause(self, reason: str, by: str) -> None:
        """Lets no new round open; `by` is who asked for it."""
        async with self._lock:
            self._refuse_if_finished()
            new, _ = state_machine.advance(self.round, state_machine.Paused(), self.run.config.rounds, time.time())
            await self._set_run(RunState.PAUSED, reason or "paused by the operator", new, by=by)

    @shielded
    async def resume(self, by: str) -> None:
        """Lets rounds open again, a round out of extensions with a fresh deadline; `by` is who asked for it."""
        async with self._lock:
            self._refuse_if_finished()
            new, _ = state_machine.advance(self.round, state_machine.Resumed(), self.run.config.rounds, time.time())
            await self._set_run(RunState.RUNNING, "", new, by=by)
            if new.phase is Phase.AGGREGATING:
                self._fold()

    @shielded
    async def stop(self, reason: str, by: str) -> None:
        """Ends the run for good; an aggregation in progress is let go; `by` is who asked for it."""
        async with self._lock:
            if self.run.state is RunState.STOPPED:
                return
            self._refuse_if_finished()
            new, _ = state_machine.advance(self.round, state_machine.Stopped(), self.run.config.rounds, time.time())
            await self._set_run(RunState.STOPPED, reason or "stopped by the operator", new, by=by)
            self._metrics.rounds.labels(self.run.id, "stopped").inc()
            self._lobby.wake_all()
            self._background.watch("files", self.tasks.start(self._forget_stopped(new)))

    @shielded
    async def roll_back(self, to: int, reason: str, by: str) -> None:
        """Takes the run back to the tensors and the state of an earlier version, as a new one that `by` asked for.

        The round in progress is over with it: what was trained for it began with what is taken back. A run that
        went back to this version last stays as it is.

        Raises:
            RunFinished: If the run is completed or stopped.
            VersionNotFound: If there is no such version, or it is the newest.
        """
        while True:
            if self._folding:
                await asyncio.wait({self._folding})  # it writes the version that would be written here
            async with self._lock:
                if self._folding is None or self._folding.done():
                    return await self._roll_back(to, reason, by)

    async def _roll_back(self, to: int, reason: str, by: str) -> None:
        self._refuse_if_finished()
        db, run = self._store.db, self.run.id
        newest = await self._store.transact(db.round_with, run, self.run.version, (), {})
        if newest and newest.metrics.get("rolled_back_to") == to:
            return
        if to >= self.run.version:
            raise VersionNotFound(
                f"{run} is at version {self.run.version}; it can go back to an earlier one, not to {to}"
            )
        source = await self._store.transact(db.version, run, to)
        base = await self._store.transact(db.version, run, self.run.version)
        previous = await self._store.transact(db.record_sha256, run, self.run.version)
        number = self.round.number
        result = await self._store.compute(go_back, self.run, number, source, base, previous, self._store)
        ended = self.round
        details: dict[str, Detail] = {"to": to, "version": number, "reason": reason}
        details["record_sha256"] = result.outcome.record_sha256
        audit_event = AuditEvent(by, "run.rolled_back", run, details)
        done, _ = state_machine.advance(ended, state_machine.RolledBack(to), self.run.config.rounds, time.time())
        await self._enter_version(done, result, {}, (audit_event,))
        self._metrics.rounds.labels(run, "rolled_back").inc()
        self._log.warning("run rolled back", to=to, version=number, reason=reason)
        self._background.watch("files", self.tasks.start(self._forget(done)))

    def _refuse_if_finished(self) -> None:
        if not self.active:
            text = "it cannot be paused, resumed, stopped or rolled back any more"
            raise RunFinished(f"{self.run.id} is {self.run.state}: {text}")

    async def _set_run(self, state: RunState, reason: str, new: Round | None = None, by: str = SERVER) -> None:
        audit_event = AuditEvent(by, f"run.{_NOW[state]}", self.run.id, {"reason": reason, "round": self.round.number})
        await self._write(
            self._store.db.save_round_and_run, new or self.round, state, reason, audit_events=(audit_event,)
        )
        self.run = replace(self.run, state=state, reason=reason)
        say = self._log.warning if state is RunState.PAUSED and by == SERVER else self._log.info
        say("run " + state, reason=reason)
        self._enter(new or self.round, ())

    async def _advance(self, event: state_machine.Event, audit_event: AuditEvent | None = None) -> bool:
        """Makes the transition of an event; returns False if the event changes nothing."""
        async with self._lock:
            new, effects = state_machine.advance(self.round, event, self.run.config.rounds, time.time())
            if new is self.round and not effects:
                return False
            pauses = [e.reason for e in effects if isinstance(e, state_machine.Pause)]
            if pauses:
                await self._set_run(RunState.PAUSED, pauses[0], new)
                self._metrics.rounds.labels(self.run.id, "paused").inc()
                return True
            await self._write(self._store.db.save_round, new, audit_events=(audit_event,) if audit_event else ())
            self._enter(new, effects)
            return True

    async def _write(
        self, method: Callable[..., None], *facts: object, audit_events: Sequence[AuditEvent] = ()
    ) -> None:
        """Makes a transition's transaction, with the bytes that were counted for the run so far."""
        await self._byte_counter.hand_out(
            self._store, lambda traffic: method(*facts, traffic, tuple(audit_events)), self.run.id
        )

    def _enter(self, new: Round, effects: tuple[state_machine.Effect, ...]) -> None:
        """Makes a state that is in the database the current one, and does what follows from it."""
        self._round_log.entered(self.round, new)
        self.round = new
        self._arm_timer()
        for effect in effects:
            match effect:
                case state_machine.Issue(tickets):
                    self.opened = time.time()
                    self._issued(self.run.id, tickets)
                    for ticket in tickets:
                        self._lobby.wake(ticket.client)
                case state_machine.Aggregate():
                    self._fold()
        gauges.show(self._metrics, self.run, new)
        self._changed(self)

    async def _aggregate(self) -> None:
        """Folds the round and commits it, once the database can be used; folding it twice gives the same bits."""
        while not self._closing:
            try:
                return await self._fold_and_commit()
            except (DatabaseUnavailable, DatabaseLocked) as error:
                self._log.error("the round cannot be aggregated yet", round=self.round.number, message=error.message)
            await asyncio.sleep(AGAIN_S)

    async def _fold_and_commit(self) -> None:
        """Folds the round in a thread and commits it; a fault pauses the run and leaves the round as it is.

        Raises:
            DatabaseUnavailable: If the database is out of reach; DatabaseLocked if another program holds a lock.
        """
        began = time.perf_counter()
        folding = self.round
        try:
            with tracing.span("fold", self.run.id, folding.number):
                result = await self._fold_round(folding)
                async with self._lock:
                    if self.run.state is RunState.STOPPED:
                        return
                    await self._commit(result, time.perf_counter() - began)
        except RoundEmptied as emptied:
            try:
                await self._reopen(emptied.excluded)
            except Exception as error:
                await self._aggregation_failed(error)
            return
        except Exception as error:
            await self._aggregation_failed(error)
            return
        # A step of its own: the next round may be there to fold before all files of this one are gone.
        self._background.watch("files", self.tasks.start(self._forget(folding)))

    async def _forget(self, done: Round) -> None:
        with self._background.attempt("files"):  # the daemon's work of that name tries again
            await self._store.forget_round(done, self.run.id)

    async def _forget_stopped(self, stopped: Round) -> None:
        """Removes what arrived for a round that will never be folded, once nothing reads it any more."""
        if self._folding:
            await asyncio.wait({self._folding})
        with self._background.attempt("files"):
            await self._store.forget_stopped(stopped)

    async def _fold_round(self, folding: Round) -> Result:
        db = self._store.db
        earlier = screening.comparable(self.run.spec, folding.number)
        found = await self._store.transact(db.fold_inputs, self.run.id, folding.number, folding.base_version, earlier)
        past = [screening.median(found.extents(number, self.run.config.training)) for number in earlier]
        facts = found.updates, found.base, found.previous_sha256, past
        return await self._store.compute(aggregate, self.run, folding, *facts, self._store)

    def _fresh_aside(self, conducts: Mapping[str, conduct.Conduct]) -> list[str]:
        """Returns those of some clients that are to be set aside and were not before."""
        before = self._participation.conducts(self.run.id)
        return [c for c, new in conducts.items() if new.is_aside and not before.get(c, conduct.GOOD).is_aside]

    async def _reopen(self, excluded: Mapping[str, str]) -> None:
        """Goes on with a round of which no update can be folded: others are sampled, as for any that was refused."""
        async with self._lock:
            config = self.run.config.rounds
            new, _ = state_machine.advance(self.round, state_machine.Excluded(excluded), config, time.time())
            if new is self.round:
                return
            await self._write(
                self._store.db.save_round, new, audit_events=audit_trail.excluded(self.round, excluded, SERVER)
            )
            self._round_log.excluded(self.round, excluded)
            self._enter(new, ())

    async def _commit(self, result: Result, seconds: float) -> None:
        config, now = self.run.config.rounds, time.time()
        outcome = result.outcome
        screened, _ = state_machine.advance(self.round, state_machine.Excluded(outcome.excluded), config, now)
        done, _ = state_machine.advance(screened, state_machine.Aggregated(), config, now)
        conducts = conduct.settled(done, config, partial(self._participation.conduct, self.run.id))
        aside = self._fresh_aside(conducts)
        written = audit_trail.committed(self.round, done, outcome, aside, SERVER)
        folded = self.round
        await self._enter_version(done, result, conducts, written)
        self._round_log.excluded(folded, outcome.excluded)  # only now: what could not be written is folded again
        for client in aside:
            self._log.warning("client set aside", client=client, refused=conducts[client].refused)
        self._round_log.committed(done, outcome, now, seconds)

    async def _enter_version(
        self, done: Round, result: Result, conducts: Mapping[str, conduct.Conduct], audit_events: Sequence[AuditEvent]
    ) -> None:
        """Writes the version that a round made, and enters the next round, or the end of the run."""
        outcome, last = result.outcome, done.number >= self.run.config.rounds.count
        state, reason = (RunState.COMPLETED, "") if last else (self.run.state, self.run.reason)
        await self._write(
            self._store.db.commit_round,
            done,
            result.version.created_at,
            outcome.weights,
            result.version,
            outcome.record,
            outcome.record_sha256,
            outcome.metrics,
            state,
            reason,
            conducts,
            audit_events=audit_events,
        )
        self._participation.put_conducts(self.run.id, conducts)
        self.run = replace(self.run, version=done.number, state=state, reason=reason)
        self._byte_counter.round_committed(self.run.id, done.number)
        self._enter(done if last else done.following(self.run.config.rounds), ())
        if last:
            self._lobby.wake_all()
        else:
            self._lobby.wake_evaluators()

    async def _aggregation_failed(self, error: Exception) -> None:
        if isinstance(error, DatabaseUnavailable | DatabaseLocked):
            raise error
        message = error.message if isinstance(error, FedpeftError) else f"{type(error).__name__}: {error}"
        self._log.error("aggregation failed", round=self.round.number, exc_info=error)
        hint = "make room and resume the run" if isinstance(error, DiskFull) else "see the log, then resume the run"
        async with self._lock:
            if not self.active:
                return
            reason = f"round {self.round.number} could not be folded: {message}; {hint}"
            try:
                await self._set_run(RunState.PAUSED, reason)
            except FedpeftError as fault:
                # Better known to this process alone than a wait that nobody explains; a restart folds anyway.
                self._log.error("cannot write the pause to the database", message=fault.message)
                self.run = replace(self.run, state=RunState.PAUSED, reason=reason)
                gauges.show(self._metrics, self.run, self.round)
                self._changed(self)

    def _fold(self) -> None:
        if self._folding is None or self._folding.done():
            self._folding = self._background.begin("fold", self._aggregate())

    async def _deadline(self) -> None:
        """Acts on the deadline; and looks again where that failed, or where the clock was set back meanwhile."""
        pause_s = AGAIN_S
        with self._background.attempt("deadline", self.run.id):
            await self._advance(state_machine.TimePassed())
            pause_s = 0.0
        self._arm_timer(pause_s)

    def _arm_timer(self, least_s: float = 0.0) -> None:
        self._disarm_timer()
        if self.active and self.round.deadline is not None:
            delay = max(least_s, self.round.deadline - time.time())
            self._timer = asyncio.get_running_loop().call_later(delay, self._act_on_deadline)

    def _act_on_deadline(self) -> None:
        self._background.watch("deadline", self.tasks.start(self._deadline()))

    def _disarm_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
