"""Rows of many calls share transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from fedpeft.errors import DiskFull, RunNotFound
from fedpeft_server.store.shared_transaction import AT_ONCE, SharedTransaction


class Disk:
    """Writes rows in transactions, each of which takes until the test says so."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self.may = asyncio.Semaphore(0)
        self.is_full = False
        self.bad = -1

    def write(self, rows: Sequence[int]) -> list[str]:
        if self.is_full:
            raise DiskFull("no room")
        if self.bad in rows:
            raise RunNotFound("it was deleted")
        self.made.append(list(rows))
        return [f"row {row}" for row in rows]

    async def call(self, method: object, rows: Sequence[int]) -> list[str]:
        await self.may.acquire()
        assert method == self.write
        return self.write(rows)


async def begun(shared: SharedTransaction[int, str], rows: range) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(shared.put(row)) for row in rows]
    await asyncio.sleep(0)  # they wait
    await asyncio.sleep(0)  # the transaction of the first one is under way
    return tasks


async def test_rows_that_come_while_a_transaction_is_made_share_the_next() -> None:
    disk = Disk()
    shared = SharedTransaction(disk.call, disk.write)
    first = await begun(shared, range(1))
    others = await begun(shared, range(1, 1 + AT_ONCE + 2))
    for _ in range(3):
        disk.may.release()
    assert await asyncio.gather(*first, *others) == [f"row {row}" for row in range(AT_ONCE + 3)]
    assert [len(rows) for rows in disk.made] == [1, AT_ONCE, 2]
    disk.may.release()
    assert await shared.put(7) == "row 7", "it goes on after a pause"


async def test_a_failed_transaction_fails_its_rows_and_no_others() -> None:
    disk = Disk()
    shared = SharedTransaction(disk.call, disk.write)
    tasks = await begun(shared, range(3))
    disk.is_full = True
    disk.may.release()
    for task in tasks:
        with pytest.raises(DiskFull):
            await task
    disk.is_full = False
    disk.may.release()
    assert await shared.put(9) == "row 9"


async def test_a_row_that_cannot_be_written_fails_alone() -> None:
    disk = Disk()
    shared = SharedTransaction(disk.call, disk.write)
    disk.bad = 1
    tasks = await begun(shared, range(3))
    for _ in range(4):
        disk.may.release()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [found[0], found[2]] == ["row 0", "row 2"] and isinstance(found[1], RunNotFound)
    assert disk.made == [[0], [2]]


async def test_a_row_is_written_though_its_caller_has_left() -> None:
    disk = Disk()
    shared = SharedTransaction(disk.call, disk.write)
    (gone, stays) = await begun(shared, range(2))
    gone.cancel()
    disk.may.release()
    assert await stays == "row 1"
    assert disk.made == [[0, 1]]
