"""Updates that come together share a transaction; each has its own receipt or its own error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import DiskFull, RoundClosed, TicketClosed
from fedpeft.rounds.events import Withdrawn
from fedpeft.rounds.state_machine import Phase, advance
from fedpeft.rounds.tickets import TicketState
from fedpeft.rounds.transitions import effects
from fedpeft_server.runs.receipts import Receipt, batch
from fedpeft_server.store.blobs.open_file import LateFile, OpenFile
from fedpeft_server.store.rows import Transition

from ..conftest import Daemon, config, filled, refused
from ..rows import CONFIG, opened, running, update_row


async def test_a_batch_takes_what_the_round_takes_and_tells_the_others_why() -> None:
    state = opened(clients=4)
    ids = [ticket.id for ticket in state.tickets]
    state = advance(state, Withdrawn(ids[3], "no power"), CONFIG.rounds, 1001.0)[0]
    given = [ids[0], ids[3], ids[0], "another", ids[1], ids[2]]
    waiting = [Receipt(update_row(ticket), "local") for ticket in given]
    before = running(state)
    found = batch(before, waiting, CONFIG.rounds, 1002.0)
    assert found.new == (waiting[0], waiting[4], waiting[5])
    assert found.repeated == (waiting[2], waiting[3])
    ((refused, error),) = found.refused
    assert refused is waiting[1] and isinstance(error, TicketClosed)
    assert not any(receipt.counted.done() for receipt in waiting), "nothing is written yet"
    made = found.transition()
    assert made is not None and made.changes.after.revision == before.revision + 1
    after = made.changes.after.round
    assert after.phase is Phase.AGGREGATING and effects(before, made.changes.after).fold
    assert [t.state for t in after.tickets] == [TicketState.RECEIVED] * 3 + [TicketState.WITHDRAWN]
    assert [audit_event.details["ticket"] for audit_event in made.audit_events] == [ids[0], ids[1], ids[2]]


async def test_what_comes_after_the_last_one_that_was_needed_is_late() -> None:
    rounds = CONFIG.rounds.model_copy(update={"clients": 1})
    state = opened(clients=2)
    waiting = [Receipt(update_row(ticket.id), "local") for ticket in state.tickets]
    found = batch(running(state), waiting, rounds, 1002.0)
    assert found.new == (waiting[0],)
    assert [(receipt, type(error)) for receipt, error in found.refused] == [(waiting[1], RoundClosed)]


def counted(method: Callable[..., None], calls: list[int]) -> Callable[..., None]:
    def call(made: Transition, *rest: Any) -> None:
        if made.updates:
            calls.append(len(made.updates))
        method(made, *rest)

    return call


async def pushed_together(daemon: Daemon, run: str, count: int) -> list[asyncio.Task[Any]]:
    """Has clients push while a transition is under way; returns the calls once all updates wait for the next."""
    clients = await daemon.clients(*(f"c{i}" for i in range(count)))
    tasks = await asyncio.gather(*(client.task() for client in clients))
    engine = daemon.server.runs.get(run)
    over = asyncio.Event()
    under_way = asyncio.create_task(engine.actor.call(over.wait))
    calls = [
        asyncio.create_task(client.push(task.ticket, filled(1.0))) for client, task in zip(clients, tasks, strict=True)
    ]
    async with asyncio.timeout(20):
        while len(engine._waiting) < count:
            await asyncio.sleep(0.01)
    over.set()
    await under_way
    return calls


async def test_updates_that_wait_share_one_transaction(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 4}))
    db, calls = daemon.server.store.db, list[int]()
    db.transit = counted(db.transit, calls)  # type: ignore[method-assign]
    answers = await asyncio.gather(*await pushed_together(daemon, run.id, 4))
    assert calls == [4]
    assert len({answer.ticket for answer in answers}) == 4
    done = await daemon.until(run.id, lambda r: r.version == 1)
    assert done.version == 1
    (found,) = await daemon.rounds(run.id)
    assert len([t for t in found.tickets if t.payload_bytes_up]) == 4


async def test_a_transaction_that_fails_gives_no_receipt_and_all_may_push_again(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 3}))
    db, once = daemon.server.store.db, [True]
    written = db.transit

    def transit(made: Transition, *rest: Any) -> None:
        if made.updates and once:
            once.clear()
            raise DiskFull("no room")
        written(made, *rest)

    db.transit = transit  # type: ignore[method-assign]
    for call in await pushed_together(daemon, run.id, 3):
        assert await refused(call) == DiskFull.reason
    engine = daemon.server.runs.get(run.id)
    assert [t.state for t in engine.round.tickets] == [TicketState.ISSUED] * 3
    for ticket in engine.round.tickets:
        await daemon.client(ticket.client).push(ticket.id, filled(1.0))
    assert (await daemon.until(run.id, lambda r: r.version == 1)).version == 1


class TestAFileThatIsOpenedLate:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "payload"
        path.write_bytes(b"0123456789")
        return path

    def test_it_is_opened_once_and_by_a_reader_alone(self, path: Path) -> None:
        opened = list[OpenFile]()

        def opening() -> OpenFile:
            opened.append(OpenFile(path, 2))
            return opened[-1]

        unread = LateFile(opening)
        assert not unread.leave() and not opened
        file = LateFile(opening)
        assert (file.read(0, 3), file.read(6, 9)) == (b"234", b"89")
        assert len(opened) == 1
        assert file.leave()
        file.close()
        with pytest.raises(ValueError, match="left"):
            file.read(0, 1)

    def test_one_that_is_left_while_it_is_opened_is_closed(self, path: Path) -> None:
        begun, go, opened = threading.Event(), threading.Event(), list[OpenFile]()

        def opening() -> OpenFile:
            begun.set()
            go.wait(10)
            opened.append(OpenFile(path))
            return opened[-1]

        file = LateFile(opening)
        reader = threading.Thread(target=lambda: file.read(0, 1))
        reader.start()
        assert begun.wait(10)
        assert file.leave()
        closer = threading.Thread(target=file.close)
        closer.start()
        go.set()
        reader.join(10)
        closer.join(10)
        assert opened[0]._file.closed
