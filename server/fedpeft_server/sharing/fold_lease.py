"""The lease by which one daemon of several folds the rounds of a run; another takes it over when its holder dies.

It ends some seconds after its holder prolonged it last, by the database's clock, so the clocks of their machines do not
matter. A holder that stood still meanwhile is not told, and need not be: its epoch is checked as its fold is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog

from fedpeft.errors import FedpeftError, RunNotFound
from fedpeft_server.store.store import Store
from fedpeft_server.timing import Timing

log = structlog.get_logger()


class FoldLease:
    """The lease of one run. A daemon that shares its database with no other needs none.

    Args:
        run: The run.
        store: Its database.
        timing: Time for which the lease is taken, and pauses.
    """

    def __init__(self, run: str, store: Store, timing: Timing) -> None:
        self._run = run
        self._store = store
        self._timing = timing

    async def take(self) -> int | None:
        """Returns the epoch of the lease, 0 where none is needed; None, after a pause, while it cannot be had.

        Raises:
            DatabaseUnavailable: If the database is out of reach; DatabaseLocked if another program holds a lock.
            DiskFull: If the database has no room.
        """
        if not self._store.db.is_shared:
            return 0
        if self._store.agreed.is_set():
            with suppress(RunNotFound):  # another has deleted it; the notice of that comes soon
                epoch = await self._store.transact(self._store.db.take_lease, self._run, self._timing.lease_s)
                if epoch is not None:
                    return epoch
        await asyncio.sleep(self._timing.lease_look_s)
        return None

    @asynccontextmanager
    async def kept(self, epoch: int) -> AsyncIterator[None]:
        """Prolongs the lease while the block lasts, then gives it back."""
        if not epoch:
            yield
            return
        keeping = asyncio.create_task(self._keep(epoch))
        try:
            yield
        finally:
            keeping.cancel()
            with suppress(FedpeftError):  # it ends by itself
                await self._store.transact(self._store.db.prolong_lease, self._run, epoch, 0.0)

    async def _keep(self, epoch: int) -> None:
        """Prolongs the lease until another holds it."""
        while True:
            await asyncio.sleep(self._timing.lease_s / 4)
            try:
                held = await self._store.transact(self._store.db.prolong_lease, self._run, epoch, self._timing.lease_s)
            except FedpeftError as error:
                log.warning("the lease of a fold cannot be prolonged yet", run=self._run, message=error.message)
                continue
            if not held:
                return
