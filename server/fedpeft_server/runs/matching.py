"""Matching: the waiting clients are offered to the runs that may sample them, as either changes.

Notable: only the runs that changed are looked at, or whose clients did; all of them once in a while, because a client
that lingers goes without a word.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress

from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.runs.participation import Participation
from fedpeft_server.timing import Timing


class Gathering:
    """Times at which quorums came together, for the rounds that runs wait to open. A restart begins anew."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, float]] = {}

    def waited_s(self, engine: RunEngine, ready: int) -> float:
        """Returns for how many seconds at least a quorum has been waiting; 0 if none is, or no round is to open.

        Args:
            engine: The run.
            ready: Clients that wait for it now.
        """
        run, current = engine.run.id, engine.round
        if current.phase is not Phase.WAITING or ready < engine.run.config.rounds.least_available:
            self._since.pop(run, None)
            return 0.0
        now = time.monotonic()
        number, since = self._since.setdefault(run, (current.number, now))
        if number != current.number:
            self._since[run], since = (current.number, now), now
        return now - since

    def forget(self, run: str) -> None:
        """Forgets a run."""
        self._since.pop(run, None)


class Matching:
    """Brings waiting clients and runs together, and shows what the clients of each run do.

    Args:
        active: The runs with rounds left to be held, by id; looked at whenever they are needed.
        participation: Answers of clients to the offers of runs.
        metrics: Metrics in which the clients of a run are counted.
        background: Watches over the matching.
        timing: Pause between two looks at all runs, and time for which a client lingers.

    Attributes:
        lobby: The clients that wait to be sampled.
    """

    def __init__(
        self,
        active: Mapping[str, RunEngine],
        participation: Participation,
        metrics: Metrics,
        background: Background,
        timing: Timing,
    ) -> None:
        self.lobby = Lobby(self.wake, timing, participation.accepted)
        self._active = active
        self._participation = participation
        self._metrics = metrics
        self._background = background
        self._timing = timing
        self._gathering = Gathering()
        self._news = asyncio.Event()
        self._changed: set[str] = set()  # runs since they were last offered the lobby
        self._counted: dict[str, Round] = {}  # of the active runs: the round whose tickets the gauges show

    def begin(self) -> None:
        """Begins to match."""
        self._background.supervise("matching", self._match())

    def wake(self, run: str) -> None:
        """Looks at a run soon: it changed, or its clients did."""
        self._changed.add(run)
        self._news.set()

    def ready(self, run: str) -> AbstractSet[str]:
        """Returns the clients that a run may sample: they wait, and they take part in it. Not a copy."""
        return self.lobby.waiting(run) if run in self._active else frozenset()

    def retire(self, run: str) -> None:
        """Forgets a run that ended; its clients are counted no more."""
        self.lobby.forget(run)
        self._gathering.forget(run)
        self._counted.pop(run, None)
        self._metrics.clients.remove_by_labels({"run": run})

    async def _match(self) -> None:
        """Offers the lobby to the runs that changed, or whose clients did; to all of them once in a while."""
        checked, interval_s = 0.0, self._timing.matching_check_s
        while True:
            self._news.clear()
            changed, self._changed = self._changed, set()
            if time.monotonic() >= checked + interval_s:
                checked, changed = time.monotonic(), set(self._active)
            await self._offer([self._active[run] for run in changed if run in self._active])
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, checked + interval_s - time.monotonic())):
                    await self._news.wait()

    async def _offer(self, engines: Iterable[RunEngine]) -> None:
        """Offers the lobby to some runs, the one that sampled longest ago first; one that is busy holds up no other."""
        for engine in sorted(engines, key=lambda e: e.opened):
            if not engine.is_offered:
                offering = self._background.begin("matching", self._offer_to(engine))
                await asyncio.wait({offering}, timeout=self._timing.matching_check_s)
        with self._background.attempt("matching"):
            for engine in engines:
                self._count_clients(engine)

    async def _offer_to(self, engine: RunEngine) -> None:
        with self._background.attempt("matching", engine.run.id):
            ready = self.ready(engine.run.id)
            await engine.offer(ready, self._gathering.waited_s(engine, len(ready)))

    def _count_clients(self, engine: RunEngine) -> None:
        """Shows what the clients of a run do; one that ended has no such series any more."""
        gauge, answers, run = self._metrics.clients, self._participation, engine.run.id
        if run not in self._active:
            return
        gauge.labels(run, "waiting").set(len(self.ready(run)))
        gauge.labels(run, "set_aside").set(answers.aside(run))
        gauge.labels(run, "declined").set(answers.declined_by(run))
        if self._counted.get(run) is not engine.round:
            self._counted[run] = engine.round
            for state in TicketState:
                gauge.labels(run, state).set(engine.round.tickets.number(state))
