"""Removal, in the background, of files of versions that the retention does not keep, or that were not committed.

A version is marked in the database before its files go, so a server that is killed in between removes them after its
next start; and they stay for a moment, for whoever was told of the version before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress

import structlog

from fedpeft.errors import RunNotFound, VersionNotFound
from fedpeft_server.background import Background
from fedpeft_server.store.retention import RetentionPolicy
from fedpeft_server.store.rows import SERVER, VersionRow
from fedpeft_server.store.store import (
    Store,
    file_key,
    state_file_key,
    state_prefix,
    version_files,
    version_prefix,
)
from fedpeft_server.tasks import TaskSet
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


class UncommittedFiles:
    """Removes the files of one run's folds that came to others than what was committed; tried again until they are.

    Args:
        run: The run's id.
        tasks: Its tasks, which its end waits for.
        store: Database and blobs.
        background: Watches over the work.
        timing: Pause before another attempt.
    """

    def __init__(self, run: str, tasks: TaskSet, store: Store, background: Background, timing: Timing) -> None:
        self._run = run
        self._tasks = tasks
        self._store = store
        self._background = background
        self._timing = timing
        self._numbers: set[int] = set()
        self._later: asyncio.TimerHandle | None = None
        self._draining = False

    def remove(self, number: int) -> None:
        """Has the files beside those of a version removed, once there is one of that number."""
        self._numbers.add(number)
        self._begin()

    def drain(self) -> None:
        """Has nothing tried again."""
        self._draining = True
        self._wait_no_more()

    def _begin(self) -> None:
        self._wait_no_more()
        self._background.watch("files", self._tasks.start(self._remove_all()))

    def _wait_no_more(self) -> None:
        if self._later is not None:
            self._later.cancel()

    async def _remove_all(self) -> None:
        with self._background.attempt("files", self._run):
            for number in sorted(self._numbers):
                with suppress(VersionNotFound, RunNotFound):  # its round was stopped, or the run deleted
                    version = await self._store.transact(self._store.db.version, self._run, number)
                    await self._store.fold(self._remove_beside, version)
                self._numbers.discard(number)
        if self._numbers and not self._draining:
            self._wait_no_more()
            self._later = asyncio.get_running_loop().call_later(self._timing.files_retry_s, self._begin)

    def _remove_beside(self, version: VersionRow) -> None:
        self._store.blobs.keep_only(file_key(version), version_prefix(version.run, version.version))
        if version.state_sha256:
            self._store.blobs.keep_only(state_file_key(version), state_prefix(version.run, version.version))


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
