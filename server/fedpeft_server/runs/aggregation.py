"""Folding the rounds of a run: spooled updates and version r - 1 become version r in the blobs, then in the database.

The fold runs in a thread and touches nothing but blobs and spool; doing it twice gives the same bytes under the same
keys, so a daemon that died in the middle just does it again, and two daemons may do it at once. Where two folds of a
round may differ, its files are named by their content: folds that draw noise do, and one of several daemons that stood
still while another had a lost update sent again, with other bytes. The version of the fold that is committed is the
only one that anybody is sent; the files of others are removed.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from fedpeft.adapters import adapter_file
from fedpeft.errors import (
    BlobCorrupt,
    DatabaseLocked,
    DatabaseUnavailable,
    DiskFull,
    FedpeftError,
    RunNotFound,
    StoreUnavailable,
)
from fedpeft.privacy.accounting import BudgetSpent
from fedpeft.privacy.round_privacy import round_privacy_of
from fedpeft.privacy.statement import EPSILON
from fedpeft.process import tracing
from fedpeft.process.durable import create_eagerly
from fedpeft.rounds import conduct, screening
from fedpeft.rounds.commit import Outcome, RoundEmptied, RunHeader, Stored, Update, fold_round, roll_back
from fedpeft.rounds.events import Aggregated, Excluded, Lost, Paused
from fedpeft.rounds.events import Event as RoundEvent
from fedpeft.rounds.policies import policy_of
from fedpeft.rounds.screening import Extent
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import TicketState
from fedpeft.rounds.transitions import RunState, RunStatus
from fedpeft_server.background import Background
from fedpeft_server.runs import audit_trail
from fedpeft_server.runs.actor import RunActor
from fedpeft_server.runs.round_log import RoundLog
from fedpeft_server.sharing.fold_lease import FoldLease
from fedpeft_server.store.blobs.integrity import Kind
from fedpeft_server.store.refusals import store_refusals
from fedpeft_server.store.rows import (
    FOUND,
    SERVER,
    FoldInputs,
    LeaseLost,
    Result,
    RunRow,
    Transition,
    UpdateRow,
    VersionRow,
)
from fedpeft_server.store.store import (
    Store,
    file_key,
    state_file_key,
    sum_key,
    version_files,
)
from fedpeft_server.timing import Timing
from fedpeft_server.version_removal import UncommittedFiles

log = structlog.get_logger()


def run_header(run: RunRow) -> RunHeader:
    """Returns what all versions of a run have in common."""
    return RunHeader(run.id, run.config, run.spec, run.backbone_fingerprint)


LOST = "the server lost the update"
"""First words of the reason of a ticket that is given out again."""


def way_back(run: RunRow) -> str:
    """Returns what an operator can do about a version whose file is lost, where no backup has it."""
    if policy_of(run.config.rounds).makes_versions:
        return "roll the run back to an earlier version"
    return "stop and delete the run, which the agent creates anew from the parent's"


def _advice(error: Exception, run: RunRow) -> str:
    """Returns advice to operators about an error that keeps a round from being folded."""
    if isinstance(error, DiskFull):
        return "then resume the run"
    if isinstance(error, BlobCorrupt):
        return f"then resume the run, or {way_back(run)}"
    return "see the log, then resume the run"


class UpdatesLost(Exception):
    """The bytes of received updates are missing or corrupt.

    Attributes:
        reasons: By ticket, why it is given out again.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = dict(reasons)


def aggregate(
    run: RunRow,
    current: Round,
    inputs: FoldInputs,
    past: Sequence[Extent],
    store: Store,
) -> Result:
    """Folds what a round received and stores the result durably.

    Args:
        run: The run.
        current: Its round, in phase AGGREGATING.
        inputs: Its updates, and facts of the rounds before, from the database.
        past: Medians of the comparable rounds before; see `fedpeft.rounds.screening`.
        store: Blobs and spool.

    Raises:
        BlobCorrupt: If the base version is not what was stored.
        UpdatesLost: If updates are not what was received.
        RoundEmptied: If no update can be folded.
        BudgetSpent: If the run may not publish another round.
        DiskFull: If there is no room for the result; StoreUnavailable if its folder refuses otherwise.
    """
    number, base, previous = current.number, inputs.base, inputs.previous_sha256
    refusals = store_refusals(f"folding round {number} of {run.id} in {store.scratch}")
    with refusals, ExitStack() as stack, TemporaryDirectory(dir=store.scratch) as scratch:
        updates = _opened(current, inputs.updates, store, stack)
        old, state = _stored(base, store, stack)
        facts = run_header(run), number, updates, old, state, previous, Path(scratch), create_eagerly, past
        try:
            outcome = fold_round(*facts, ledger=inputs.ledger, epsilon=inputs.figures.get(EPSILON, 0.0))
        except BlobCorrupt:  # of a file that was verified before: it is reported and set aside as any other
            store.distrust(base)
            _stored(base, store, stack)
            raise
        if not policy_of(run.config.rounds).makes_versions:
            store.blobs.put(sum_key(run.id, number, outcome.made.sha256), Path(scratch, "sum"), outcome.made.sha256)
            return Result(outcome, store.clock.time(), None)
        draw = _content(outcome) if store.db.is_shared or round_privacy_of(run.config).central else ""
        version = _version(run, number, outcome, store.clock.time(), draw=draw)
        if outcome.state_sha256:
            store.blobs.put(state_file_key(version), Path(scratch, "state"), outcome.state_sha256)
        store.blobs.put(file_key(version), Path(scratch, "adapter"), outcome.made.sha256)
    return Result(outcome, version.created_at, version)


def _version(
    run: RunRow, number: int, outcome: Outcome, now: float, source: int | None = None, draw: str = ""
) -> VersionRow:
    made = outcome.made
    return VersionRow(run.id, number, made.sha256, made.size_bytes, outcome.state_sha256, now, source, draw)


def _content(outcome: Outcome) -> str:
    """Returns a name for the content of a fold's files."""
    return hashlib.sha256(f"{outcome.made.sha256} {outcome.state_sha256}".encode()).hexdigest()[:16]


def _opened(current: Round, received: Mapping[str, UpdateRow], store: Store, stack: ExitStack) -> list[Update]:
    """Returns the received updates of a round, mapped for as long as `stack` is open.

    Raises:
        UpdatesLost: If some are not what was received.
    """
    updates, lost = [], {}
    for ticket in current.in_state(TicketState.RECEIVED):
        row = received[ticket.id]
        try:
            data = stack.enter_context(store.updates.open(ticket.id, row.manifest.sha256))
        except BlobCorrupt as error:
            lost[ticket.id] = f"{LOST}{FOUND}{error.message}"
            continue
        facts = ticket.id, ticket.client, row.examples, row.metrics, row.manifest, data, row.norm
        updates.append(Update(*facts, current.staleness(ticket)))
    if lost:
        raise UpdatesLost(lost)
    return updates


def _stored(version: VersionRow, store: Store, stack: ExitStack) -> tuple[Stored, Stored | None]:
    """Returns the verified files of a version and of its state, which stay for as long as `stack` is open.

    Raises:
        BlobCorrupt: If one is not what was stored.
    """
    path = stack.enter_context(store.blobs.verified(file_key(version), version.sha256, Kind.VERSION))
    if not version.state_sha256:
        return Stored(path, version.sha256), None
    state = stack.enter_context(store.blobs.verified(state_file_key(version), version.state_sha256, Kind.STATE))
    return Stored(path, version.sha256), Stored(state, version.state_sha256)


def go_back(
    run: RunRow,
    number: int,
    source: VersionRow,
    base: VersionRow,
    previous: str,
    store: Store,
    epsilon: float | None = None,
) -> Result:
    """Makes version `number` of the tensors and the state of an earlier one, and stores it durably.

    Args:
        run: The run.
        number: Number of the round in progress.
        source: The row of the earlier version.
        base: The row of the newest version.
        previous: Digest of its record.
        store: Blobs.
        epsilon: Spent so far; None where the run adds no noise.

    Raises:
        BlobCorrupt: If the earlier version is not what was stored.
        DiskFull: If there is no room for the result; StoreUnavailable if its folder refuses otherwise.
    """
    refusals = store_refusals(f"going back to version {source.version} of {run.id} in {store.scratch}")
    with refusals, ExitStack() as stack, TemporaryDirectory(dir=store.scratch) as scratch:
        old, state = _stored(source, store, stack)
        parts = (
            source.version,
            old,
            base.sha256,
            source.state_sha256,
            previous,
            Path(scratch),
            create_eagerly,
            epsilon,
        )
        outcome = roll_back(run_header(run), number, *parts)
        version = _version(run, number, outcome, store.clock.time(), source.version)
        if state:
            copy = shutil.copyfile(state.path, Path(scratch, "state"))
            adapter_file.check_digest(copy, state.sha256)
            store.blobs.put(state_file_key(version), copy, state.sha256)
        store.blobs.put(file_key(version), Path(scratch, "adapter"))
    return Result(outcome, version.created_at, version)


class Folding:
    """Folds and commits the rounds of one run as their time comes; of several daemons, the one that has the lease.

    Args:
        actor: The run.
        store: Database, blobs and spool.
        background: Watches over what no call waits for.
        round_log: Told of what was folded.
        timing: Pause before a fold that the database did not allow is tried again.
    """

    def __init__(
        self, actor: RunActor, store: Store, background: Background, round_log: RoundLog, timing: Timing
    ) -> None:
        self._actor = actor
        self._store = store
        self._background = background
        self._round_log = round_log
        self._timing = timing
        self._lease = FoldLease(actor.run.id, store, timing)
        self._task: asyncio.Task[None] | None = None
        self._uncommitted = UncommittedFiles(actor.run.id, actor.tasks, store, background, timing)
        self.forget_uncommitted = self._uncommitted.remove
        self._put_off = 0, ""
        self._due = False
        self._closing = False
        self._log = log.bind(run=actor.run.id)

    @property
    def put_off(self) -> str:
        """Reason for which the round could not be folded here when that was last tried; empty if it could."""
        number, reason = self._put_off
        return reason if number == self._actor.round.number else ""

    def begin(self) -> None:
        """Begins the fold of the round in progress; one that is at work goes on with it."""
        self._due = True
        if self._task is None or self._task.done():
            self._task = self._background.begin("fold", self._fold())

    async def idle(self) -> None:
        """Waits until nothing is folded."""
        if self._task:
            await asyncio.wait({self._task})

    def drain(self) -> None:
        """Lets a fold at work finish; no other begins, and what could not be done is not tried again."""
        self._closing = True
        self._uncommitted.drain()

    async def _fold(self) -> None:
        """Folds the round and commits it, once the database can be used; folding it twice gives the same bits."""
        while self._due and self._actor.status.folds and not self._closing:
            self._due = False
            try:
                epoch = await self._lease.take()
                if epoch is None:
                    self._due = True
                    continue
                async with self._lease.kept(epoch):
                    if epoch:
                        await self._actor.call(self._actor.refresh)  # its last holder may have folded the round
                    if self._actor.status.folds:
                        await self._fold_and_commit(self._actor.round, epoch)
                self._put_off = 0, ""
            except LeaseLost:
                self._due, self._put_off = True, (0, "")
            except RunNotFound:  # another daemon has deleted it
                return
            except (DatabaseUnavailable, DatabaseLocked, DiskFull, StoreUnavailable) as error:
                number = self._actor.round.number
                self._due, self._put_off = True, (number, error.message)
                self._log.error("the round cannot be aggregated yet", round=number, message=error.message)
                await asyncio.sleep(self._timing.fold_retry_s)

    async def _fold_and_commit(self, folding: Round, epoch: int) -> None:
        """Folds a round in a thread and commits it; a fault pauses the run and leaves the round as it is.

        Raises:
            LeaseLost: If another daemon has taken the lease of that epoch.
            DatabaseUnavailable: If the database is out of reach; DatabaseLocked if another program holds a lock.
            StoreUnavailable: If files are out of reach of this server, and others may reach them; likewise DiskFull.
        """
        began = time.perf_counter()
        try:
            with tracing.span("fold", self._actor.run.id, folding.number):
                result = await self._fold_round(folding)
                try:
                    committed = await self._actor.call(lambda: self._commit(folding, result, began, epoch))
                except RunNotFound:
                    await self._undo(folding.number, result)
                    raise
                finally:
                    if result.version is not None and result.version.draw:
                        self.forget_uncommitted(folding.number)
        except RoundEmptied as emptied:
            await self._reopen(folding, Excluded(emptied.excluded), epoch)
            return
        except UpdatesLost as lost:
            await self._reopen(folding, Lost(lost.reasons), epoch)
            return
        except BudgetSpent as spent:
            reason = str(spent)
            await self._actor.call(lambda: self._pause(folding, reason, epoch))
            return
        except (LeaseLost, RunNotFound):
            raise
        except Exception as error:
            await self._fail(folding, error, epoch)
            return
        if committed:  # a step of its own: the next round may be there to fold before all files of this one are gone
            self._background.watch("files", self._actor.tasks.start(self.forget(folding)))

    async def _undo(self, number: int, result: Result) -> None:
        """Removes the files of a fold whose run was deleted meanwhile; one made anew may need the same."""
        run, made = self._actor.run.id, result.version
        keys = [sum_key(run, number, result.outcome.made.sha256)]
        if made is not None:
            keys = [each.key for each in version_files(made)]
        try:
            if not await self._store.transact(self._store.db.states, [run]):
                await self._store.fold(self._store.blobs.delete, keys)
        except Exception as error:  # nobody comes back to a run that is not there
            traced = None if isinstance(error, FedpeftError) else error
            said = "files of a deleted run stay; remove them"
            self._log.error(said, files=keys, message=str(error), exc_info=traced)

    async def _fold_round(self, folding: Round) -> Result:
        db = self._store.db
        earlier = screening.comparable(self._actor.run.spec, folding.number)
        found = await self._store.read(
            db.fold_inputs, self._actor.run.id, folding.number, folding.base_version, earlier
        )
        past = [screening.median(found.extents(number, self._actor.run.config.training)) for number in earlier]
        return await self._store.fold(aggregate, self._actor.run, folding, found, past, self._store)

    async def _commit(self, folding: Round, result: Result, began: float, epoch: int) -> bool:
        """Writes the version that a round made; returns False if another engine did, or the run was stopped."""
        outcome, config = result.outcome, self._actor.run.config.rounds
        seconds = time.perf_counter() - began

        async def decide(status: RunStatus) -> Transition | None:
            if not _is_folding(status, folding):
                return None
            events: list[RoundEvent] = [Excluded(outcome.excluded), Aggregated()]
            if outcome.overspent and folding.number < config.count:
                events.append(Paused(outcome.overspent))
            if (changes := self._actor.changes(status, *events)) is None:
                return None
            clients = [ticket.client for ticket in folding.tickets]
            known = await self._store.transact(self._store.db.conducts, self._actor.run.id, clients)
            after = conduct.settled(changes.round, config, lambda client: known.get(client, conduct.GOOD))
            aside = [c for c, new in after.items() if new.is_aside and not known.get(c, conduct.GOOD).is_aside]
            said = audit_trail.committed(status.round, changes.round, outcome, aside, SERVER)
            return Transition(changes, result=result, conducts=after, audit_events=said, epoch=epoch)

        made = await self._actor.transit(decide)
        if made is None:
            return False
        self._round_log.excluded(folding, outcome.excluded)  # only now: what could not be written is folded again
        for event in made.audit_events:
            if event.action == audit_trail.SET_ASIDE:
                client = str(event.details["client"])
                self._log.warning("client set aside", client=client, refused=made.conducts[client].refused)
        self._round_log.committed(made.changes.round, outcome, result.at, seconds)
        if outcome.overspent and made.changes.after.state is RunState.PAUSED:
            self._log.warning("run paused", reason=outcome.overspent)
        return True

    async def _reopen(self, folding: Round, event: Excluded | Lost, epoch: int) -> None:
        """Goes on with a round that cannot be folded: others are sampled, or clients whose updates got lost are asked.

        A round that is folded by another server meanwhile stays as it is.

        Raises:
            LeaseLost: If that one folds it now, and finds for itself what can be folded.
        """
        is_lost = isinstance(event, Lost)
        say, tell = (
            (audit_trail.lost, self._round_log.lost) if is_lost else (audit_trail.excluded, self._round_log.excluded)
        )

        async def decide(status: RunStatus) -> Transition | None:
            if not _is_folding(status, folding) or not (changes := self._actor.changes(status, event)):
                return None
            return Transition(changes, audit_events=say(status.round, event.reasons, SERVER), epoch=epoch)

        try:
            if await self._actor.call(lambda: self._actor.transit(decide)):
                tell(folding, event.reasons)
        except LeaseLost:
            raise
        except Exception as error:
            await self._fail(folding, error, epoch)

    async def _fail(self, folding: Round, error: Exception, epoch: int) -> None:
        """Pauses the run, because its round cannot be folded; raises LeaseLost if another server folds it now.

        An error of the database, or of files where another server may reach them, is raised again.
        """
        away = self._store.db.is_shared and isinstance(error, DiskFull | StoreUnavailable)
        if away or isinstance(error, DatabaseUnavailable | DatabaseLocked):
            raise error
        message = error.message if isinstance(error, FedpeftError) else f"{type(error).__name__}: {error}"
        traced = None if isinstance(error, DiskFull | StoreUnavailable) else error
        self._log.error("aggregation failed", round=folding.number, message=message, exc_info=traced)
        reason = f"round {folding.number} could not be folded{FOUND}{message}; {_advice(error, self._actor.run)}"
        await self._actor.call(lambda: self._pause(folding, reason, epoch))

    async def _pause(self, folding: Round, reason: str, epoch: int) -> None:
        try:
            await self._actor.refresh()
            if _is_folding(self._actor.status, folding):  # else another server has folded it
                await self._actor.advance(Paused(reason), epoch=epoch)
        except FedpeftError as fault:
            # Better known to this process alone than a wait that nobody explains; a restart folds anyway.
            self._log.error("cannot write the pause to the database", message=fault.message)
            self._actor.presume(RunState.PAUSED, reason)

    async def forget(self, done: Round) -> None:
        """Removes what a round that is over no longer needs."""
        with self._background.attempt("files"):  # the daemon's work of that name tries again
            await self._store.forget_round(done, self._actor.run.id)

    async def forget_here(self, done: Round, current: Round) -> None:
        """Removes what is here of a round that ended with another daemon."""
        with self._background.attempt("files"):
            await self._store.forget_round_here(done, current)

    async def forget_stopped(self, stopped: Round) -> None:
        """Removes what arrived for a round that will never be folded, once nothing reads it any more."""
        await self.idle()
        with self._background.attempt("files"):
            await self._store.forget_stopped(stopped)


def _is_folding(status: RunStatus, folding: Round) -> bool:
    """Returns True if a run is still at the round that was folded."""
    return status.folds and status.round.number == folding.number
