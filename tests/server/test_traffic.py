"""The bytes of a round: what is in the database once a transition is, whatever becomes of the process."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import grpc
import pytest

from fedpeft_server import app

from .conftest import SPEC, Daemon, StartDaemon, config, filled, free_port, refused
from .test_process import running

SIZE = 4 * SPEC.parameters
Stored = dict[tuple[int, str], tuple[int, int, int, int]]


def stored(folder: Path) -> Stored:
    """Returns wire up and down, payload up and down of each round and client as the database has them now."""
    with sqlite3.connect(f"file:{folder / 'fedpeft.db'}?mode=ro", uri=True) as database:
        rows = database.execute("SELECT number, client, wire_up, wire_down, payload_up, payload_down FROM traffic")
        found = {(number, client): tuple(bytes_) for number, client, *bytes_ in rows}
    database.close()
    return found  # type: ignore[return-value]


async def test_what_was_counted_before_a_receipt_survives_a_kill(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, "--metrics", "", port=port) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
            run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
            a, b = await daemon.clients("a", "b")
            task, _ = await asyncio.gather(a.task(), b.task())
            await a.pull(run.id, 0)
            await a.push(task.ticket, filled(1.0))
            process.kill()
            process.wait()
    wire_up, wire_down, payload_up, payload_down = stored(tmp_path)[1, "a"]
    assert (payload_up, payload_down) == (SIZE, SIZE)
    assert wire_up > SIZE and wire_down > SIZE


async def test_a_withdrawal_a_refusal_and_a_commit_write_what_was_counted_too(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "BOOK_S", 3600.0)
    daemon = await start()
    folder = daemon.server.settings.data_dir
    run = await daemon.create(config(rounds={"count": 1, "clients": 3, "quorum": 1}))
    a, b, c = await daemon.clients("a", "b", "c")
    tasks = await asyncio.gather(a.task(), b.task(), c.task())
    await b.pull(run.id, 0)
    await b.withdraw(tasks[1].ticket)
    assert stored(folder)[1, "b"][3] == SIZE
    await c.pull(run.id, 0)
    assert await refused(c.push(tasks[2].ticket, filled(float("nan")))) == "PAYLOAD_INVALID"
    assert stored(folder)[1, "c"][2:] == (SIZE, SIZE)
    await a.pull(run.id, 0)
    await a.push(tasks[0].ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    (done,) = await daemon.rounds(run.id)
    assert done.payload_bytes_up == 2 * SIZE
    assert {t.client: t.wire_bytes_up for t in done.tickets} == {
        client: bytes_[0] for (_, client), bytes_ in stored(folder).items()
    }
