"""The store as one thing: database, blobs and spool, each called on the thread that suits it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from fedpeft.rounds import Round, TicketState
from fedpeft_server.store.blobs import Blobs
from fedpeft_server.store.database import Database
from fedpeft_server.store.outbound import Outbound
from fedpeft_server.store.spool import Spool

P = ParamSpec("P")
R = TypeVar("R")

_CREATION = "create-"

COMPUTE_THREADS = 4
"""Threads that hash, check, sync and fold; all of it releases the interpreter's lock."""


class Store:
    """What outlives the process.

    Args:
        folder: The data folder, locked by this process.
        database: SQLAlchemy URL, or empty for SQLite in the folder.
        blobs: URL or folder of the adapter versions, or empty for the data folder.
        keep_updates: Whether counted updates stay in the spool after their round.
    """

    def __init__(self, folder: Path, database: str, blobs: str, *, keep_updates: bool) -> None:
        self.keep_updates = keep_updates
        self.db = Database.open(database or f"sqlite:///{folder / 'fedpeft.db'}")
        self.blobs = Blobs(blobs or str(folder / "blobs"))
        self.spool = Spool(folder / "spool", keep_manifests=keep_updates)
        self.outbound = Outbound(folder / "outbound", self.blobs)
        self.scratch = folder / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self._transactions = ThreadPoolExecutor(1, "database")
        self._pool = ThreadPoolExecutor(COMPUTE_THREADS, "compute")

    async def call(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs one transaction on the database's thread, in the order of the calls; also when its caller leaves."""
        loop = asyncio.get_running_loop()
        return await asyncio.shield(loop.run_in_executor(self._transactions, lambda: method(*args, **kwargs)))

    async def compute(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs work that takes long on one of the other threads."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: function(*args, **kwargs))

    async def forget_round(self, done: Round, run_id: str) -> None:
        """Removes what a committed round no longer needs; what arrived and was not counted is never needed."""
        kept = (TicketState.RECEIVED,) if self.keep_updates else ()
        await self.compute(self.spool.remove_all, [t.id for t in done.tickets if t.state not in kept])
        await self.compute(self.outbound.keep_from, run_id, done.number)

    def forget_run(self, run_id: str, tickets: Iterable[str]) -> None:
        """Removes everything of a deleted run, whose tickets these were, but its database rows."""
        self.spool.remove_all(tickets)
        self.outbound.forget(run_id)
        self.blobs.delete_prefix(f"runs/{run_id}/")

    def sweep(self, runs: Collection[str], tickets: Collection[str]) -> None:
        """Removes what a process that was killed left behind; for the start of the server.

        A run that is not in the database is removed only where its creation had begun here: another database may have
        been named by mistake, and others may keep blobs at the same place.

        Args:
            runs: Those in the database.
            tickets: Those whose uploads may still be wanted.
        """
        for key in self.spool.tickets():
            if key.startswith(_CREATION):
                run = key.removeprefix(_CREATION)
                if run not in runs:
                    self.forget_run(run, ())
                self.spool.remove(key)
        if not self.keep_updates:
            self.spool.sweep(set(tickets))

    def close(self) -> None:
        """Ends the threads, then the database."""
        self._pool.shutdown()
        self._transactions.shutdown()
        self.db.close()


def creation_key(run_id: str) -> str:
    """Returns what the upload of a new run's first version is called in the spool."""
    return _CREATION + run_id


def version_key(run_id: str, version: int) -> str:
    """Returns the blob key of an adapter version."""
    return f"runs/{run_id}/versions/{version:06}.safetensors"


def state_key(run_id: str, version: int) -> str:
    """Returns the blob key of the strategy's state that belongs to an adapter version."""
    return f"runs/{run_id}/state/{version:06}.safetensors"
