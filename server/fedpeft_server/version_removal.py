"""Removal of the files of adapter versions that the server's retention does not keep, in the background.

A version is marked in the database before its files go, so a server that is killed in between removes them after its
next start; and they stay for a moment, for whoever was told of the version before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import structlog

from fedpeft_server.background import Background
from fedpeft_server.store.retention import RetentionPolicy
from fedpeft_server.store.rows import SERVER, VersionRow
from fedpeft_server.store.store import Store, version_files
from fedpeft_server.timing import Timing

log = structlog.get_logger()

SHOWN = 8
"""Most versions that a line of the log names."""

Marked = Callable[[str, Collection[int]], None]
"""Told a run and versions that nobody is given any more."""


class VersionRemoval:
    """Keeps the versions of all runs within the retention of this server.

    Args:
        store: Database and blobs.
        policy: The retention; None: every version is kept.
        background: Watches over the work.
        marked: Told of versions whose files are about to be removed.
        timing: Pauses.
    """

    def __init__(
        self, store: Store, policy: RetentionPolicy | None, background: Background, marked: Marked, timing: Timing
    ) -> None:
        self._store = store
        self._policy = policy
        self._background = background
        self._marked = marked
        self._timing = timing
        self._due = _Queue()
        self._marked_in = _Queue()

    def look(self, run: str) -> None:
        """Has the versions of a run looked at, for it has made one."""
        if self._policy is not None:
            self._due.put(run)

    async def begin(self, runs: Iterable[str]) -> None:
        """Begins the work, with all runs, and with what a server that was killed left."""
        for run in await self._store.transact(self._store.db.retention.runs_removing):
            self._marked_in.put(run)
        for run in runs:
            self.look(run)
        self._background.supervise("retention", self._work(self._due, self._decide))
        self._background.supervise("retention", self._work(self._marked_in, self._remove, self._timing.removal_delay_s))

    async def _work(self, queue: _Queue, step: Callable[[str], Awaitable[None]], delay_s: float = 0.0) -> None:
        while True:
            runs = await queue.take()
            await asyncio.sleep(delay_s)
            for run in runs:
                done = False
                with self._background.attempt("retention", run):
                    await step(run)
                    done = True
                if not done:
                    await asyncio.sleep(self._timing.fold_retry_s)
                    queue.put(run)

    async def _decide(self, run: str) -> None:
        """Marks versions that are to be removed."""
        more = True
        while more and self._policy is not None:
            step = await self._store.transact(self._store.db.retention.decide, run, self._policy, SERVER)
            more = step.more
            if step.removing:
                self._marked(run, step.removing)
                self._marked_in.put(run)
                await self._store.fold(self._store.download_cache.forget_versions, run, step.removing)

    async def _remove(self, run: str) -> None:
        """Removes the files of marked versions."""
        while rows := await self._store.transact(self._store.db.retention.removing, run):
            await self._store.version(self._remove_files, rows)
            numbers = [row.version for row in rows]
            await self._store.transact(self._store.db.retention.removed, run, numbers)
            log.info("versions removed", run=run, number=len(numbers), versions=numbers[:SHOWN])

    def _remove_files(self, rows: Sequence[VersionRow]) -> None:
        self._store.blobs.delete([key for row in rows for _, key, _ in version_files(row)])


class _Queue:
    """Runs that wait for something, each once."""

    def __init__(self) -> None:
        self._runs: dict[str, None] = {}
        self._filled = asyncio.Event()

    def put(self, run: str) -> None:
        self._runs[run] = None
        self._filled.set()

    async def take(self) -> list[str]:
        """Waits for runs; takes all."""
        await self._filled.wait()
        self._filled.clear()
        taken, self._runs = list(self._runs), {}
        return taken
