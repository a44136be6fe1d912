"""The store as one thing: database, blobs and spool, each called on the thread that suits it."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, Protocol, Self, TypeVar

import structlog

from fedpeft.errors import DatabaseLocked, DiskFull, RunNotFound, VersionNotFound
from fedpeft.process.mounts import file_bytes, tree_bytes
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import DATABASE_FILE, database_url
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.blobs.download_cache import DownloadCache
from fedpeft_server.store.blobs.integrity import Corruption, Integrity
from fedpeft_server.store.blobs.open_file import LateFile, OpenFile
from fedpeft_server.store.blobs.room import Room
from fedpeft_server.store.database import Database
from fedpeft_server.store.queries.rounds import select_known
from fedpeft_server.store.rows import VersionRow
from fedpeft_server.store.shared_transaction import SharedTransaction
from fedpeft_server.store.spool import Spool
from fedpeft_server.store.transactions import READERS
from fedpeft_server.store.update_store import BucketUpdates, UpdateStore
from fedpeft_server.tasks import END_S, end_within, ended, succeeded
from fedpeft_server.timing import Timing

log = structlog.get_logger()


class Closable(Protocol):
    """Something open."""

    def close(self) -> None:
        """Closes it."""


P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Closable)

_NEW_VERSION = "version-"

COMPUTE_THREADS = 4
"""Threads that check uploads and sync them; all of it releases the interpreter's lock. A receipt waits for nothing
else's."""
FOLD_THREADS = 4
"""Threads that fold rounds, and remove what those leave behind: work that no call waits for. A fold takes long, and a
bucket that hangs may take all of them."""
FILE_THREADS = 8
"""Threads for what takes a moment as a rule: a chunk of a transfer written or read, a file opened or removed. They are
apart from the others, so that no chunk waits for the check of another upload."""
VERSION_THREADS = 8
"""Threads that store adapter versions but those of folds, make them ready to be sent (fetched from a bucket, hashed,
encoded, opened), and remove those of deleted runs. A bucket that hangs may take all of them, and holds up neither an
upload nor a fold."""


class Store:
    """The durable state of a server.

    Args:
        folder: The data folder, locked by this process.
        database: SQLAlchemy URL, or empty for SQLite in the folder.
        blobs: URL or folder of the adapter versions, or empty for the data folder.
        updates: URL or folder of an object store where whole updates lie too, or empty for the data folder alone.
        timing: Longest wait of a transaction for a lock of another program.
        keep_updates: True to keep counted updates in the spool after their round.
        min_free_bytes: Free bytes of each disk that uploads, new runs and encoded versions leave; None for a part of
            the disk.
        tell: Called, in any thread, with each stored file that is found to be corrupt.

    Attributes:
        clock: The time on the database's clock.
        spool: Spool in which updates arrive.
        updates: Place of updates until nothing needs them.
        places: Folders and object stores that flags name.
        room: Room on the disks of the data folder and of the other folders.
        stored_bytes: Bytes of the files in the folders, by place, as they were measured last.
        registrations: Writes clients as they register.
        answers: Writes their answers to the offers of runs; the result is False where there is no such run.
        agreed: Set unless other daemons on the database may still say that they keep files elsewhere: no round is
            folded before.
    """

    def __init__(
        self,
        folder: Path,
        database: str,
        blobs: str,
        updates: str = "",
        *,
        timing: Timing,
        keep_updates: bool,
        min_free_bytes: int | None = None,
        tell: Callable[[Corruption], object] = lambda found: None,
    ) -> None:
        self._folder = folder
        self._timing = timing
        self.keep_updates = keep_updates
        try:
            self.db = Database.open(database_url(database, folder), timing)
        except DiskFull as error:
            raise DiskFull(f"{'--database' if database else f'--data-dir {folder}'}: {error.message}") from None
        self.db.transactions.wait_at_most(0)  # `transact` waits, and keeps the database's thread free meanwhile
        self.clock = self.db.clock
        files, flag = Integrity(tell, timing.file_trusted_s), "--blobs" if blobs else "--data-dir"
        self.blobs = Blobs(blobs or str(folder / "blobs"), folder / "cache", flag, files)
        self.places = [self.blobs]
        if updates:
            self.places.append(Blobs(updates, folder / "fetched", "--updates", files))
        named = dict(zip(("blobs", "updates"), self.places, strict=False))
        self._folders = {place: blobs.folder for place, blobs in named.items() if blobs.folder is not None}
        self.room = Room(folder, min_free_bytes, self._folders)
        self.stored_bytes: Mapping[str, int] = {}
        self.spool = Spool(folder / "spool", keep_manifests=keep_updates, files=files, room=self.room)
        self.updates: UpdateStore = BucketUpdates(self.spool, self.places[-1]) if updates else self.spool
        self.download_cache = DownloadCache(folder / "outbound", self.blobs, files, self.room)
        self.scratch = folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self.agreed = asyncio.Event()
        self.agreed.set()
        self._transactions = ThreadPoolExecutor(1, "database")
        self.registrations = SharedTransaction(self.transact, self.db.see_clients)
        self.answers = SharedTransaction(self.transact, self.db.put_answers)
        self._readers = ThreadPoolExecutor(READERS, "reading")
        self._reads = asyncio.Semaphore(READERS)
        self._pool = ThreadPoolExecutor(COMPUTE_THREADS, "compute")
        self._folds = ThreadPoolExecutor(FOLD_THREADS, "fold")
        self._files = ThreadPoolExecutor(FILE_THREADS, "files")
        self._versions = ThreadPoolExecutor(VERSION_THREADS, "versions")

    async def transact(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs one transaction on the database's thread, in the order of the calls; also when its caller leaves.

        While another program holds a lock it is tried again and again, and lets the others pass: reading goes on.

        Raises:
            DatabaseLocked: If that lasts for `database_busy_s`.
        """
        return await ended(self.begin(method, *args, **kwargs))

    def begin(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Task[R]:
        """Begins what `transact` waits for: the task ends with the transaction's result, or its error."""
        return asyncio.ensure_future(self._run_transaction(lambda: method(*args, **kwargs)))

    async def _run_transaction(self, transaction: Callable[[], R]) -> R:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timing.database_busy_s
        while True:
            try:
                return await loop.run_in_executor(self._transactions, transaction)
            except DatabaseLocked:
                if loop.time() > until:
                    raise
            await asyncio.sleep(self._timing.database_retry_s)

    async def read(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs a transaction that only reads, and may take long: it holds up no other, on a thread of its own kind.

        It sees what all transactions wrote that were asked for before it, and nothing of those after.

        Raises:
            DatabaseLocked: As `transact`.
        """
        return await self.read_prepared(lambda: lambda: method(*args, **kwargs))

    async def read_prepared(self, prepare: Callable[[], Callable[[], R]]) -> R:
        """Runs what `prepare` returns as `read` does; `prepare` is called at the moment whose state will be read."""
        return await ended(asyncio.ensure_future(self._read(prepare)))

    async def _read(self, prepare: Callable[[], Callable[[], R]]) -> R:
        async with self._reads:  # so that a connection is free, and the database's thread waits for none
            reading = await self.begin(self.db.transactions.begin_read, self._readers, prepare())
            return await asyncio.wrap_future(reading)

    async def compute(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Checks an upload, makes it durable, or does other work on what has arrived, on a thread of its own kind."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))

    async def fold(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Folds a round, or removes what one left behind, on a thread of its own kind."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._folds, lambda: function(*args, **kwargs))

    async def file(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs a short piece of work on files on a thread of its own kind."""
        return await self.begin_file(function, *args, **kwargs)

    def begin_file(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[R]:
        """Begins what `file` waits for, with no task of its own: it takes longer than many a piece of such work."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._files, lambda: function(*args, **kwargs))

    def identities(self) -> tuple[tuple[str, str], ...]:
        """Returns what tells the places of adapter versions and of updates from all others, each with its name."""
        places = [(place.identity(), place.name) for place in self.places]
        own = self.db.transactions.notices.sender, "no --updates"  # the spool is nobody else's
        return tuple(places) if len(places) > 1 else (*places, own)

    async def set_clock(self) -> None:
        """Sets the clock by the database's, if other daemons may share that.

        Raises:
            FedpeftError: If it cannot be asked.
        """
        if self.db.is_shared:
            await self.clock.set(lambda: self.transact(self.db.now))

    async def version(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Stores an adapter version, makes it ready or removes it on a thread of its own kind."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._versions, lambda: function(*args, **kwargs))

    async def read_file(self, file: LateFile, offset: int, length: int) -> bytes:
        """Returns bytes of a version that `opened_late` gave, and opens it before the first; raises as its `read`."""
        if not file.is_open:
            await self.version(file.open)
        return await self.file(file.read, offset, length)

    def soon(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Has a short piece of work on files done that nobody waits for; its failure is logged."""
        self._files.submit(function, *args, **kwargs).add_done_callback(_tell_failure)

    @asynccontextmanager
    async def opened(self, function: Callable[P, C], *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[C]:
        """Gives what a function opens; it is closed on a thread too, also where the caller leaves meanwhile."""
        opening = asyncio.ensure_future(self.version(function, *args, **kwargs))
        try:
            yield await ended(opening)
        finally:
            opening.add_done_callback(self._close)

    @asynccontextmanager
    async def opened_late(self, opening: Callable[[], OpenFile]) -> AsyncIterator[LateFile]:
        """Gives a file that its first reader opens; one that was is closed on a thread."""
        file = LateFile(opening)
        try:
            yield file
        finally:
            if file.leave():  # not on the others' threads: it may have to wait until the file is open
                self._versions.submit(file.close).add_done_callback(_tell_failure)

    def _close(self, opening: asyncio.Future[C]) -> None:
        if succeeded(opening):
            self.soon(opening.result().close)

    def distrust(self, version: VersionRow) -> None:
        """Has the files of a version verified when they are next read, though they were before."""
        for file in version_files(version):
            self.blobs.distrust(file.key)

    async def forget_round(self, done: Round, run_id: str) -> None:
        """Removes what a committed round no longer needs; what arrived and was not counted is never needed.

        Tickets that outlive the round still need what has arrived for them, and the versions that they start from.
        """
        kept = (TicketState.ISSUED, *((TicketState.RECEIVED,) if self.keep_updates else ()))
        oldest = min((t.base_version for t in done.in_state(TicketState.ISSUED)), default=done.number)
        await self.fold(self.download_cache.keep_from, run_id, oldest)
        await self.fold(self.updates.remove_all, [t.id for t in done.tickets if t.state not in kept])

    async def forget_round_here(self, done: Round, current: Round) -> None:
        """Removes what is here of a round that ended with another daemon, which removes what both have.

        Tickets that outlive it are in the one that goes on now.
        """
        kept = {ticket.id for ticket in current.tickets} if current.number != done.number else set()
        if self.keep_updates:
            kept |= {ticket.id for ticket in done.in_state(TicketState.RECEIVED)}
        oldest = min((t.base_version for t in current.in_state(TicketState.ISSUED)), default=done.number)
        await self.fold(self.download_cache.keep_from, done.run, min(oldest, done.number))
        await self.fold(self.spool.remove_all, [t.id for t in done.tickets if t.id not in kept])

    async def forget_stopped(self, stopped: Round) -> None:
        """Removes what arrived for a round that was stopped: nothing of it counted, so nothing is kept."""
        await self.fold(self.updates.remove_all, [ticket.id for ticket in stopped.tickets])

    def clean(self) -> None:
        """Tries again to remove files that could not be removed.

        Raises:
            StoreUnavailable: If some still cannot be.
        """
        try:
            self.updates.clean()
        finally:
            self.download_cache.clean()

    def forget_run(self, run_id: str, tickets: Iterable[str]) -> None:
        """Removes everything of a deleted run, whose tickets these were, but its database rows."""
        self.updates.remove_all(tickets)
        self.download_cache.forget(run_id)
        self.blobs.delete_prefix(f"runs/{run_id}/")

    def forget_sums(self, run_id: str, version: int) -> None:
        """Removes the sums of the rounds up to the one whose version the parent's server made."""
        kept = f"{sum_prefix(run_id)}{version + 1:06}"
        self.blobs.delete([key for key in self.blobs.keys(sum_prefix(run_id).rstrip("/")) if key < kept])

    async def has(self, new: NewVersion) -> bool:
        """Returns True if a version is in the database: its transaction may have been made, and its answer lost.

        Raises:
            FedpeftError: If that cannot be found out; its file must stay.
        """
        try:
            row = await self.transact(self.db.version, new.run, new.version)
        except (RunNotFound, VersionNotFound):
            return False
        return row.draw == new.draw

    def undo(self, version: NewVersion) -> None:
        """Removes the file of a version that did not come into the database, and nothing else of its run."""
        if version.draw:
            self.blobs.delete((version.blob_key,))
        else:
            self.forget_run(version.run, ())  # its id was drawn for it

    async def sweep(self, runs: Collection[str], tickets: Collection[str]) -> None:
        """Removes what a process that was killed left behind; for the start of the server.

        Another database may have been named by mistake, or not be restored yet, and others may keep blobs at the same
        place: a run that is not in the database is removed only where its creation had begun here, and a whole update
        of a ticket that is not in it stays.

        Args:
            runs: Those in the database.
            tickets: Those whose uploads may still be wanted.
        """
        await self.compute(self._undo_creations, runs)
        partial_ones = self.spool.others(set(tickets), whole=False)
        whole = set(self.spool.others(set(tickets))).difference(partial_ones)
        known = await self.transact(self._known, sorted(whole))
        if whole - known:
            log.warning(
                "received updates of tickets that the database does not know stay; if they are this server's, restore "
                "the database from the backup or name it with --database, else remove them",
                folder=str(self._folder / "spool"),
                updates=len(whole - known),
            )
        place = self.spool if self.keep_updates else self.updates  # of what is partial here another may have kept all
        unwanted = partial_ones if self.keep_updates else [*partial_ones, *known]
        await self.compute(place.remove_all, unwanted)

    def _known(self, tickets: Sequence[str]) -> set[str]:
        with self.db.transactions.read() as connection:
            return select_known(connection, tickets)

    def _undo_creations(self, runs: Collection[str]) -> None:
        for key in self.spool.tickets():
            if key.startswith(_NEW_VERSION):
                version = NewVersion.of(key)
                if version.run not in runs:
                    self.undo(version)
                self.updates.remove_all((key,))

    def measure(self) -> Mapping[str, int]:
        """Measures the bytes of the files in the data folder and in the folders beside it, by place, and keeps them."""
        names = ("spool", "outbound", "cache", "fetched", "scratch")
        folders = {name: self._folder / name for name in names} | self._folders
        places = {name: tree_bytes(folder) for name, folder in folders.items()}
        places["database"] = sum(file_bytes(path) for path in self._folder.glob(f"{DATABASE_FILE}*"))
        self.stored_bytes = places
        return places

    def close(self) -> None:
        """Ends the threads, then the database."""
        end_within(END_S, self._end)

    def _end(self) -> None:
        self._folds.shutdown()
        self._pool.shutdown()
        self._versions.shutdown()
        self._files.shutdown()
        self._transactions.shutdown()
        self._readers.shutdown()  # to which a transaction may have given a snapshot
        self.db.close()


def _tell_failure(done: Future[Any]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        log.error("cannot close or remove a file", exc_info=error)


class NewVersion(NamedTuple):
    """A version that is uploaded: the first one of a new run, or one of the parent's server.

    Several calls may bring the same version of a parent's run; `draw` tells them apart. It is empty for a run that does
    not relay: no other call has the id that was drawn for it.
    """

    run: str
    version: int
    draw: str

    @classmethod
    def of(cls, spool_key: str) -> Self:
        """Returns the version whose upload has this name in the spool."""
        run, version, draw = spool_key.removeprefix(_NEW_VERSION).rsplit("-", 2)
        return cls(run, int(version), draw)

    @classmethod
    def relayed(cls, run: str, version: int) -> Self:
        """Returns a version of a parent's run, as this call brings it."""
        return cls(run, version, secrets.token_hex(8))

    @property
    def spool_key(self) -> str:
        """Name of its upload in the spool, which tells the next start that something of it may be left."""
        return f"{_NEW_VERSION}{self.run}-{self.version}-{self.draw}"

    @property
    def blob_key(self) -> str:
        """Key of its file."""
        return version_key(self.run, self.version, draw=self.draw)


def version_key(run_id: str, version: int, source: int | None = None, draw: str = "") -> str:
    """Returns the blob key of an adapter version; `source` and `draw` are those of its row.

    One key has one content: another server may be folding the round that a rollback ends, and writes what it has;
    several daemons may fold a round of other updates, or draw other noise; and a parent's server may make a version
    again.
    """
    return f"{version_prefix(run_id, version)}{_suffix(source, draw)}.safetensors"


def state_key(run_id: str, version: int, source: int | None = None, draw: str = "") -> str:
    """Returns the blob key of the strategy's state that belongs to an adapter version."""
    return f"{state_prefix(run_id, version)}{_suffix(source, draw)}.safetensors"


def sum_key(run_id: str, number: int, sha256: str) -> str:
    """Returns the blob key of the sum that a round made for a parent's server, named by its content too."""
    return f"{sum_prefix(run_id)}{number:06}-{sha256[:16]}.sum128"


def sum_prefix(run_id: str) -> str:
    """Returns the beginning of the keys of all sums of a run."""
    return f"runs/{run_id}/sums/"


def version_prefix(run_id: str, version: int) -> str:
    """Returns the beginning of the keys of all files that were made for an adapter version."""
    return f"runs/{run_id}/versions/{version:06}"


def state_prefix(run_id: str, version: int) -> str:
    """Returns the same for the strategy's state."""
    return f"runs/{run_id}/state/{version:06}"


def file_key(version: VersionRow) -> str:
    """Returns the blob key of the file of a version."""
    return version_key(version.run, version.version, version.source, version.draw)


def state_file_key(version: VersionRow) -> str:
    """Returns the blob key of the state that belongs to a version."""
    return state_key(version.run, version.version, version.source, version.draw)


class BlobFile(NamedTuple):
    """A file that the database names: its kind, its key, and its digest, hexadecimal."""

    kind: str
    key: str
    sha256: str


def version_files(version: VersionRow) -> Iterator[BlobFile]:
    """Yields the files of a version."""
    yield BlobFile("version", file_key(version), version.sha256)
    if version.state_sha256:
        yield BlobFile("state", state_file_key(version), version.state_sha256)


def sum_files(run_id: str, sums: Mapping[int, str]) -> Iterator[BlobFile]:
    """Yields the files of sums, whose digests are given by round."""
    return (BlobFile("sum", sum_key(run_id, number, sha256), sha256) for number, sha256 in sums.items())


def _suffix(source: int | None, draw: str) -> str:
    return (f"-draw-{draw}" if draw else "") if source is None else f"-of-{source:06}"
