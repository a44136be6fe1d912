"""All runs of the server: their engines and the order of their creation, from each run's beginning to its deletion."""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import structlog

from fedpeft import ids
from fedpeft.errors import (
    DatabaseUnavailable,
    RunNotFinished,
    RunNotFound,
    StateInvalid,
    TicketNotFound,
    VersionNotFound,
)
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import Ticket, TicketState
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.matching import Matching
from fedpeft_server.runs.participation import Participation
from fedpeft_server.runs.progress_watch import ProgressWatch
from fedpeft_server.runs.scoring import Scoring
from fedpeft_server.runs.ticket_index import TicketIndex
from fedpeft_server.runs.waiting import NAMED, Reasons, awaited
from fedpeft_server.store.retention import RetentionPolicy
from fedpeft_server.store.rows import AnswerRow, AuditEvent, GaugeSnapshot, RunRow, RunState, VersionRow
from fedpeft_server.store.store import NewVersion, Store
from fedpeft_server.tasks import TaskSet, shielded
from fedpeft_server.timing import Timing
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.version_removal import VersionRemoval
from fedpeft_server.watchers import Watchers

log = structlog.get_logger()

Age = tuple[float, str]
"""Time of a run's creation, and its id: the order of runs."""


class Runs:
    """The runs, in the order of their creation.

    Args:
        store: Database, blobs and spool.
        byte_counter: Bytes of the rounds.
        metrics: Metrics in which events are counted.
        background: Watches over what no call waits for.
        progress: Watches the clients that open rounds await.
        participation: Answers of clients to the offers of runs.
        known: The runs of the database, each with its round in progress; `start` takes them up.
        timing: Pauses between looks at the lobby, and before another attempt at a failed transition.
        retention: The versions whose files are kept; None: all.

    Attributes:
        participation: Answers of clients to the offers of runs.
        progress: Progress of the clients that open rounds await.
        scoring: Versions that evaluators have scored.
        watchers: Those who are told of the changes of a run.
        matching: Brings runs and waiting clients together.
        lobby: Those clients.
        tasks: Commands under way that go to their end though their caller leaves.
    """

    def __init__(
        self,
        store: Store,
        byte_counter: ByteCounter,
        metrics: Metrics,
        background: Background,
        progress: ProgressWatch,
        participation: Participation,
        known: Iterable[tuple[RunRow, Round]],
        timing: Timing,
        retention: RetentionPolicy | None = None,
    ) -> None:
        self.participation = participation
        self.progress = progress
        self.scoring = Scoring(store)
        self.watchers = Watchers()
        self.tasks = TaskSet()
        self._store = store
        self._byte_counter = byte_counter
        self._metrics = metrics
        self._background = background
        self._timing = timing
        self._removal = VersionRemoval(store, retention, background, self.note_removed, timing)
        self._engines: dict[str, RunEngine] = {}
        self._active: dict[str, RunEngine] = {}  # those with rounds left, oldest first: finished ones stay for months
        self._tickets = TicketIndex()  # of the active runs
        self._ages: list[Age] = []
        self._reasons = Reasons()
        self.matching = Matching(self._active, participation, metrics, background, timing)
        self.lobby = self.matching.lobby
        for run, current in known:
            self._add(self._engine(run, current))

    async def start(self) -> None:
        """Takes up every run where the last process left it."""
        held = {t.id for e in self._engines.values() if e.active for t in e.round.tickets}
        sizes = await self._store.compute(self._store.spool.sizes, held)
        if sizes:
            await self._store.transact(self._store.db.count_spooled, sizes)
        for engine in self._engines.values():
            await self._show_again(engine)
        await self._store.sweep(self._engines, held)
        for engine in self._engines.values():
            await self._start(engine)
        await self._removal.begin(self._engines)
        self.matching.begin()
        self._background.every("progress", self._timing.progress_check_s, self._look_at_progress)

    def drain(self) -> None:
        """Ends waits for rounds, and has nothing folded, nor tried again, that is not under way."""
        self.lobby.close()
        for engine in self._engines.values():
            engine.folding.drain()

    async def close(self) -> None:
        """Lets aggregations finish; the background's end sees to it that no new round opens."""
        await self.tasks.wait()
        for engine in self._engines.values():
            await engine.close()

    @shielded
    async def create(self, run: RunRow, new: NewVersion, first: Callable[[], VersionRow], by: str) -> RunEngine:
        """Adds a run that `by` asks for; `first` stores its first version, which is undone if it cannot be added.

        The upload of that version is removed once it is known what became of the run: until then it tells the next
        start of the server that something of it may be left.

        Raises:
            RequestIdReused: If a run of the same request, or id, was added meanwhile.
            DatabaseUnavailable: If it may have been added or not; then all files of it stay.
        """
        try:
            version = await self._store.version(first)
            audit_event = AuditEvent(
                by, "run.created", run.id, {"name": run.config.name, "adapter_sha256": version.sha256}
            )
            await self._store.transact(self._store.db.create_run, run, version, (audit_event,))
        except Exception as error:
            if not (isinstance(error, DatabaseUnavailable | StateInvalid) and await self._store.has(new)):
                await self._store.version(self._store.undo, new)
                await self._store.version(self._store.updates.remove_all, (new.spool_key,))
                raise
        await self._store.version(self._store.updates.remove_all, (new.spool_key,))
        return self._begin(run)

    @shielded
    async def adopt(self, run_id: str) -> RunEngine:
        """Returns the engine of a run that is in the database; makes it if the answer to the run's making was lost.

        Another daemon may have made the run, and be in the middle of it.

        Raises:
            RunNotFound: If there is no such run.
        """
        ((run, current),) = await self._store.transact(self._store.db.standings, run_id)
        is_new = run_id not in self._engines
        engine = self._begin(run, current)
        if is_new and self._store.db.is_shared:
            await self._take_up(engine)
        return engine

    @shielded
    async def delete(self, run_id: str, by: str) -> None:
        """Removes a finished run with everything of it but its entries in the audit log; `by` is who asked for it."""
        engine = await self.look_up(run_id)
        if engine.active and self._store.db.is_shared:
            await engine.refresh()
        if engine.active:
            raise RunNotFinished(f"{run_id} is {engine.run.state}; stop it before it is deleted")
        await engine.close()
        tickets = await self._store.read(self._store.db.ticket_ids, run_id)
        audit_event = AuditEvent(by, "run.deleted", run_id, {"name": engine.run.config.name})
        # The files first: while the run is listed its deletion can be repeated, and afterwards nothing finds them.
        await self._store.version(self._store.forget_run, run_id, tickets)
        with suppress(RunNotFound):  # another daemon was first, or this one, and its answer was lost
            await self._store.transact(self._store.db.delete_run, run_id, (audit_event,))
        if self._engines.get(run_id) is engine:
            self._drop(engine)
        log.info("run deleted", run=run_id)

    async def look_up(self, run_id: str) -> RunEngine:
        """Returns the engine of a run, which another daemon may have made a moment ago.

        Raises:
            RunNotFound: If there is no such run.
        """
        if run_id not in self._engines and self._store.db.is_shared and ids.RUN.fullmatch(run_id):
            with suppress(RunNotFound):
                return await self.adopt(run_id)
        return self.get(run_id)

    async def with_version(self, run_id: str, version: int) -> RunEngine:
        """Returns the engine of a run that has a version, which another daemon may have made a moment ago.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If it has no such version.
        """
        engine = await self.look_up(run_id)
        if version > engine.run.version and self._store.db.is_shared:
            await engine.refresh()
        if version > engine.run.version:
            raise VersionNotFound(f"{run_id} has no version {version}; the newest is {engine.run.version}")
        return engine

    async def follow(self, run_id: str) -> None:
        """Takes up what another daemon has made of a run: a new one, another state, or none any more.

        That of a known run goes on without the caller after `follow_run_s`: its commands, or a fold, may wait for a
        bucket. A new one is known in the end, for what comes after it.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.follow_run_s if run_id in self._engines else None):
                await self._follow(run_id)

    @shielded
    async def _follow(self, run_id: str) -> None:
        engine = self._engines.get(run_id)
        try:
            await (self.adopt(run_id) if engine is None else engine.refresh())
        except RunNotFound:
            if engine is not None and self._engines.get(run_id) is engine:
                self._drop(engine)
                await self._store.file(self._store.download_cache.forget, run_id)
                log.info("run deleted by another server", run=run_id)
                with suppress(RunNotFound):  # an edge's run may be made anew, with the same id
                    await self.adopt(run_id)
                await engine.close()

    async def follow_all(self, revisions: Mapping[str, int], *, active: bool) -> None:
        """Takes up what other daemons have made of all runs, or of the active ones; those are given by revision."""
        known = self._active if active else self._engines
        for run_id in {*revisions, *known}:
            engine = self._engines.get(run_id)
            if engine is None or engine.run.revision != revisions.get(run_id):
                await self.follow(run_id)

    def follow_answer(self, answer: AnswerRow) -> None:
        """Takes up the answer of a client to another daemon."""
        self.participation.put(answer)
        self.lobby.sort(answer.client)
        self._changed(self.get(answer.run))

    def follow_registration(self, client: str, before: str, role: str) -> None:
        """Takes up that a client began anew with another daemon: any of them asks it again for each run."""
        if role == "evaluator":
            self.scoring.reread(client)
        elif before == "evaluator":
            self.dismiss_evaluator(client)
        self.ask_again(client)
        self.lobby.wake(client)

    async def show_scores(self, run_id: str, version: int) -> None:
        """Shows the newest figures of a run, which other daemons have written, and tells the watchers of a version."""
        engine = self.find(run_id)
        if engine is not None:
            await self._show_scored(engine)
            self.show_backlog(engine)
            self.watchers.announce(run_id, version)

    async def show_traffic(self) -> None:
        """Shows the bytes of the rounds in progress as they are in the database, those of all daemons together."""
        for engine in list(self._active.values()):
            await self._show_bytes(engine)

    def _drop(self, engine: RunEngine) -> None:
        """Forgets a run that was deleted."""
        run_id = engine.run.id
        del self._engines[run_id]
        self._ages.remove(engine.age)
        if run_id in self._active:
            self._retire(run_id)
        self.participation.forget(run_id)
        self.scoring.forget(run_id)
        self.progress.forget(run_id)
        self._reasons.forget(run_id)
        self._byte_counter.forget(run_id)
        self._metrics.forget(run_id)
        self._background.forget(run_id)
        self._changed(engine)

    def get(self, run_id: str) -> RunEngine:
        """Returns the engine of a run.

        Raises:
            RunNotFound: If there is no such run.
        """
        try:
            return self._engines[run_id]
        except KeyError:
            raise RunNotFound(f"there is no run {run_id[:64]!r}") from None

    def all(self, run_id: str = "") -> list[RunEngine]:
        """Returns the engines a client that names `run_id` (or nothing) could work for, oldest first."""
        return [self.get(run_id)] if run_id else list(self._engines.values())

    def exist(self, run_id: str = "") -> bool:
        """Returns True if there are runs that a client could work for that names `run_id` (or nothing).

        Raises:
            RunNotFound: If there is no such run.
        """
        return bool(self.get(run_id) if run_id else self._engines)

    async def states(self, runs: Sequence[str]) -> dict[str, RunState]:
        """Returns the states of those of some runs that exist, here or with another daemon alone until now."""
        known = {run: self._engines[run].run.state for run in runs if run in self._engines}
        others = [run for run in runs if run not in known and ids.RUN.fullmatch(run)]
        if others and self._store.db.is_shared:
            known |= await self._store.transact(self._store.db.states, others)
        return known

    def active(self, run_id: str = "") -> list[RunEngine]:
        """Returns, of the engines that `all` returns, those with rounds left to be held."""
        if run_id:
            return [engine] if (engine := self.get(run_id)).active else []
        return list(self._active.values())

    def after(self, age: Age, most: int) -> list[Age]:
        """Returns the first so many runs that are younger than an age, oldest first."""
        first = bisect.bisect_right(self._ages, age)
        return self._ages[first : first + most]

    def find(self, run_id: str) -> RunEngine | None:
        """Returns the engine of a run; None if there is none of that id."""
        return self._engines.get(run_id)

    def is_usable(self, run_id: str, client: str, ticket_id: str) -> bool:
        """Returns True if a client can use a ticket of a run now."""
        engine = self._engines.get(run_id)
        ticket = None if engine is None else engine.open_ticket(client)
        return ticket is not None and ticket.id == ticket_id

    async def ticket(self, ticket_id: str) -> tuple[RunEngine, Ticket]:
        """Returns a ticket of any round, with the engine of its run.

        Raises:
            TicketNotFound: If there is no such ticket.
        """
        run = self._tickets.run_of(ticket_id)
        if run is not None:
            engine = self._engines[run]
            return engine, engine.round.ticket(ticket_id)
        row = await self._store.transact(self._store.db.ticket, ticket_id)
        engine = await self.look_up(row.run)
        if row.ticket.state is TicketState.ISSUED:
            await engine.refresh()  # another server has given it out
        return engine, row.ticket

    @shielded
    async def answer(self, answer: AnswerRow, by: str) -> None:
        """Takes what `by` says for a client to the offer of a run; a ticket that it holds there goes with a decline.

        Raises:
            RunNotFound: If there is no such run.
        """
        engine = await self.look_up(answer.run)
        if not await self._store.answers.put(answer):
            raise RunNotFound(f"there is no run {answer.run}")
        self.participation.put(answer)
        self.lobby.sort(answer.client)
        ticket = None if answer.accepted else engine.open_ticket(answer.client)
        if ticket:
            with suppress(TicketNotFound):  # its round is over, and with it the ticket
                await engine.withdraw(ticket, "; ".join(answer.reasons), by)
        self._changed(engine)

    @shielded
    async def readmit(self, client: str, run_id: str, by: str) -> list[str]:
        """Lets a client back that was set aside, in one run or in all, because `by` asks for it; returns those runs.

        Raises:
            RunNotFound: If there is no such run.
        """
        engines = [await self.look_up(run_id)] if run_id else self.all()
        found = [e for e in engines if self.participation.conduct(e.run.id, client).is_aside]
        for engine in found:
            await engine.readmit(client, by)
        return [engine.run.id for engine in found]

    def ask_again(self, client: str) -> None:
        """Has a client that began anew asked again for each run; until it answers it is sampled for none."""
        self.participation.ask_again(client)
        self.lobby.sort(client)

    def why(self, engine: RunEngine, *, for_operator: bool = False) -> str:
        """Returns a sentence on what a run waits for; an operator is told more: which clients hang, and of places."""
        run, answers, now = engine.run.id, self.participation, self._store.clock.time()
        facts = engine, now, len(self.matching.ready(run)), answers.declined_by(run), answers.awaited(run)
        if not for_operator:
            return self._reasons.of(*facts)
        ill = {who: verdict.words for who, _, verdict in self.progress.awaited(engine, NAMED) if not verdict.is_well}
        return awaited(*facts, ill, for_operator=True)

    def note_removed(self, run_id: str, versions: Collection[int]) -> None:
        """Notes that the files of versions are about to be removed: nobody is to score them any more."""
        self.scoring.note_removed(run_id, versions)
        if (engine := self.find(run_id)) is not None:
            self.show_backlog(engine)

    def show_backlog(self, engine: RunEngine) -> None:
        """Shows how many versions of a run are still to be scored by whoever scores them, unless that is unknown."""
        if (backlog := self.scoring.backlog(engine.run)) is not None:
            self._metrics.evaluation_backlog.labels(engine.run.id).set(backlog)

    def dismiss_evaluator(self, client: str) -> None:
        """Awaits no figures of an evaluator any more: it left, was revoked, or trains from now on."""
        for run in self.scoring.dismiss(client):
            self.show_backlog(self._engines[run])
            self.watchers.announce(run)

    def _begin(self, run: RunRow, current: Round | None = None) -> RunEngine:
        """Returns the engine of a new run, made unless a repetition of its request was there first."""
        if run.id not in self._engines:
            self._add(self._engine(run, current or Round(run.id, run.version + 1)))
            log.info("run created", run=run.id, name=run.config.name, method=run.spec.method)
            self.lobby.wake_all()
        return self._engines[run.id]

    def _add(self, engine: RunEngine) -> None:
        self._engines[engine.run.id] = engine
        bisect.insort(self._ages, engine.age)
        self.scoring.follow(engine.run)
        self._sort(engine)

    def _sort(self, engine: RunEngine) -> None:
        """Puts a run among the active ones, or takes it out, once its state is another."""
        if engine.active:
            self._tickets.follow(engine.round)
        if engine.active is (engine.run.id in self._active):
            return
        if engine.active:
            later = [run for run, other in self._active.items() if other.age > engine.age]
            self._active[engine.run.id] = engine
            for run in later:  # as a rule there are none
                self._active[run] = self._active.pop(run)
        else:
            self._retire(engine.run.id)

    def _retire(self, run: str) -> None:
        """Takes a run that ended out of what is kept of the active ones."""
        del self._active[run]
        self._tickets.forget(run)
        self.matching.retire(run)
        self._background.forget(run)

    def _engine(self, run: RunRow, current: Round) -> RunEngine:
        parts = (self._store, self.lobby, self.participation, self._byte_counter, self._metrics, self._background)
        return RunEngine(run, current, *parts, self.progress.issued, self._changed, self._timing, self._removal.look)

    async def _take_up(self, engine: RunEngine) -> None:
        """Takes up a run that another daemon made."""
        await self._show_again(engine)
        await self._start(engine)
        await engine.refresh()

    async def _start(self, engine: RunEngine) -> None:
        self.progress.issued(engine.run.id, engine.awaited())
        await engine.start()

    async def _show_scored(self, engine: RunEngine) -> GaugeSnapshot:
        run = engine.run.id
        snapshot = await self._store.transact(self._store.db.gauge_snapshot, run, engine.round.number)
        for split, figures in snapshot.scored.items():
            self._metrics.scored(run, split, figures)
        return snapshot

    async def _show_bytes(self, engine: RunEngine) -> None:
        run, number = engine.run.id, engine.round.number
        snapshot = await self._store.transact(self._store.db.gauge_snapshot, run, number)
        if number == engine.round.number and engine.active:
            self._byte_counter.resume(run, number, snapshot.current, snapshot.last)

    async def _show_again(self, engine: RunEngine) -> None:
        """Sets the gauges that would else be empty until the next round or the next figures."""
        run, snapshot = engine.run.id, await self._show_scored(engine)
        self._metrics.committed(run, snapshot.metrics)
        over = engine.round.phase is Phase.COMMITTED
        self._byte_counter.resume(run, engine.round.number + over, snapshot.current, snapshot.last)

    def _changed(self, engine: RunEngine) -> None:
        if engine.run.id in self._engines:
            self._sort(engine)
            self.scoring.follow(engine.run)
            self.show_backlog(engine)
        self.watchers.announce(engine.run.id)
        self.matching.wake(engine.run.id)

    async def _look_at_progress(self) -> None:
        await self.progress.check(self._active.values(), self.watchers.announce)
