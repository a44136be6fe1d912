"""Threads of the store: work of one kind that takes long, or hangs, holds up no work of another kind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.pool import QueuePool

from fedpeft.errors import FedpeftError
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1.access_service_pb2 import ListAuditEntriesRequest
from fedpeft.v1.access_service_pb2_grpc import AccessServiceStub
from fedpeft_server.rpc.history import History
from fedpeft_server.runs import aggregation
from fedpeft_server.store import store
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import Place
from fedpeft_server.store.store import Store
from fedpeft_server.store.transactions import READERS, Transactions
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, StartDaemon, config, filled
from ..rows import run_row, version_row

AUDIT = ListAuditEntriesRequest()
SHORT = config(rounds={"count": 1, "clients": 1})


async def test_a_receipt_is_given_while_as_many_folds_as_there_are_threads_hang(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, go_on, folds = await start(), Event(), list[object]()
    aggregate = aggregation.aggregate

    def hangs(*facts: object) -> object:
        folds.append(facts)
        go_on.wait()
        return aggregate(*facts)  # type: ignore[arg-type]

    monkeypatch.setattr(aggregation, "aggregate", hangs)
    (client,) = await daemon.clients("a")
    try:
        for number in range(store.FOLD_THREADS):
            run = await daemon.create(SHORT, request_id=str(number))
            await client.push((await client.task(run.id)).ticket, filled(1.0))
            async with asyncio.timeout(10):
                while len(folds) <= number:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            last = await daemon.create(SHORT, request_id="last")
            receipt = await client.push((await client.task(last.id)).ticket, filled(1.0))
        assert receipt.sha256
        assert len(folds) == store.FOLD_THREADS, "the fold of the last run waits, and its receipt did not"
    finally:
        go_on.set()
    await daemon.until(last.id, lambda run: run.version == 1)


class Gate:
    """Holds up the calls of a method, on whatever thread they are made."""

    def __init__(self) -> None:
        self.calls = 0
        self.open = Event()

    def before(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the method, held up."""

        def held(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.open.wait()
            return method(*args, **kwargs)

        return held

    async def reached(self, calls: int = 1) -> None:
        """Waits until so many calls are held up."""
        async with asyncio.timeout(10):
            while self.calls < calls:
                await asyncio.sleep(0.01)


LISTS: list[tuple[type, str, Callable[[Daemon, str], Awaitable[object]]]] = [
    (Database, "rounds_from", lambda d, run: d.rounds(run)),
    (Database, "clients_from", lambda d, run: d.operator.ListClients(op.ListClientsRequest())),
    (Database, "initial_evaluations", lambda d, run: d.operator.ListRuns(op.ListRunsRequest())),
    (
        Transactions,
        "entries_after",
        lambda d, run: AccessServiceStub(d.channel).ListAuditEntries(ListAuditEntriesRequest()),
    ),
]


@pytest.mark.parametrize(("owner", "method", "listed"), LISTS, ids=[name for _, name, _ in LISTS])
async def test_a_receipt_is_given_while_lists_take_long(
    owner: type,
    method: str,
    listed: Callable[[Daemon, str], Awaitable[object]],
    start: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    daemon, gate = await start(), Gate()
    run = (await daemon.create(SHORT)).id
    (client,) = await daemon.clients("a")
    task = await client.task(run)
    monkeypatch.setattr(owner, method, gate.before(getattr(owner, method)))
    lists = [asyncio.ensure_future(listed(daemon, run)) for _ in range(READERS + 1)]
    try:
        await gate.reached(READERS)
        async with asyncio.timeout(10):
            assert (await client.push(task.ticket, filled(1.0))).sha256
    finally:
        gate.open.set()
    await asyncio.gather(*lists)


@pytest.fixture
def both(tmp_path: Path, url: str) -> Iterator[Store]:
    """A store on each kind of database."""
    (tmp_path / "data").mkdir()
    opened = Store(tmp_path / "data", url, "", keep_updates=False, timing=TIMING)
    yield opened
    opened.close()


async def test_a_reading_sees_what_was_asked_for_before_it_and_nothing_after(both: Store) -> None:
    gate, runs = Gate(), both.db.runs
    async with asyncio.timeout(20):
        first = both.begin(both.db.create_run, run_row(), version_row(0))
        reading = asyncio.ensure_future(both.read(gate.before(runs)))
        await gate.reached()
        await both.transact(both.db.delete_run, run_row().id)
        gate.open.set()
        assert [run.id for run in await reading] == [run_row().id]
        assert await both.read(runs) == []
        await first


async def test_nothing_is_written_where_only_reading_is_possible(both: Store) -> None:
    with pytest.raises(RuntimeError, match="only reading is possible"):
        await both.read(both.db.create_run, run_row(), version_row(0))
    insert = text("INSERT INTO audit (number) VALUES (1)")

    def writes() -> None:
        with both.db.transactions.read() as connection:
            connection.execute(insert)

    with pytest.raises(FedpeftError, match=r"readonly|read-only"):
        await both.read(writes)
    assert await both.read(both.db.runs) == []


@pytest.mark.timed(traffic_write_s=3600.0, payload_write_delay_s=3600.0)
@pytest.mark.parametrize("written_first", [True, False])
async def test_bytes_on_their_way_into_the_database_are_listed_once(
    written_first: bool, start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, gate = await start(), Gate()
    run = (await daemon.create(SHORT)).id
    (client,) = await daemon.clients("a")
    task = await client.task(run)
    _, data = await client.pull(run, 0)
    kept, counter = daemon.server.store, daemon.server.byte_counter
    held = kept.begin(gate.before(lambda: None))
    if written_first:
        writing = asyncio.ensure_future(counter.write(kept))
        await asyncio.sleep(0)
        listing = asyncio.ensure_future(daemon.rounds(run))
    else:
        history = History(kept, counter)
        engine = daemon.server.runs.get(run)
        listing = asyncio.ensure_future(history.part(engine, Place(0)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writing = asyncio.ensure_future(counter.write(kept))
    await asyncio.sleep(0.1)
    gate.open.set()
    found = await listing
    shown = found[0] if written_first else found[0][0]  # type: ignore[index]
    assert shown.payload_bytes_down == len(data)
    await asyncio.gather(held, writing)
    (shown,) = await daemon.rounds(run)
    assert shown.payload_bytes_down == len(data)
    assert task.ticket


async def test_a_snapshot_is_closed_where_the_loop_ends_while_it_is_taken(both: Store) -> None:
    gate, readers, before = Gate(), both.db.transactions.readers, asyncio.all_tasks()
    pool = readers.pool
    assert isinstance(pool, QueuePool)
    event.listen(readers, "before_cursor_execute", gate.before(lambda *_: None))
    reading = asyncio.ensure_future(both.read(both.db.runs))
    await gate.reached()
    begun = asyncio.all_tasks() - before
    for task in begun:  # as the loop does at its end
        task.cancel()
    await asyncio.gather(*begun, return_exceptions=True)
    assert reading.cancelled()
    gate.open.set()
    both.close()
    assert (pool.checkedout(), pool.checkedin()) == (0, 0)
