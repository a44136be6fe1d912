"""Rows of many calls in one transaction: those that come while one is made share the next.

A transaction waits for the disk. Ten thousand clients that register one transaction after another would wait for it ten
thousand times; together they wait for it as often as it can be made in that time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from fedpeft.errors import DiskFull, Unavailable
from fedpeft_server.tasks import ended

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")
Writing = Callable[[Sequence[RowT]], Sequence[ResultT]]

AT_ONCE = 500
"""Most rows of one transaction, so that it does not hold up the others that wait for the database's thread."""


class SharedTransaction(Generic[RowT, ResultT]):
    """Writes rows of one kind, in the order in which they come.

    Args:
        call: Calls a function with rows on the database's thread.
        write: That function: writes rows in one transaction, and returns a result for each. If it fails, each row gets
            a transaction of its own, and what that raises; if the database is away or full, all fail at once.
    """

    def __init__(
        self,
        call: Callable[[Writing[RowT, ResultT], Sequence[RowT]], Awaitable[Sequence[ResultT]]],
        write: Writing[RowT, ResultT],
    ) -> None:
        self._call = call
        self._write = write
        self._waiting: list[tuple[RowT, asyncio.Future[ResultT]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, row: RowT) -> ResultT:
        """Writes a row, also when the caller leaves, and returns its result.

        Raises:
            FedpeftError: As the transaction does.
        """
        done: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((row, done))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        return await ended(done)

    async def _write_all(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                await self._write_together(batch)
        finally:
            self._writing = None

    async def _write_together(self, batch: Sequence[tuple[RowT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = await self._call(self._write, [row for row, _ in batch])
        except Exception as error:
            if len(batch) > 1 and not isinstance(
                error, DiskFull | Unavailable
            ):  # one bad row must not fail those beside it
                for each in batch:
                    await self._write_together([each])
                return
            for _, done in batch:
                done.set_exception(error)
            return
        except BaseException:
            for _, done in batch:
                done.cancel()
            raise
        for (_, done), result in zip(batch, results, strict=True):
            done.set_result(result)
