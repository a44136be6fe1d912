from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.rounds import record
from fedpeft.v1 import run_pb2

from ..conftest import SPEC, Daemon, StartDaemon, config, filled, header, refused, zeros


async def test_a_run_of_two_rounds_gives_the_weighted_mean_of_the_updates(daemon: Daemon) -> None:
    run = await daemon.create()
    a, b = await daemon.clients("a", "b")
    expected = zeros()
    for number in (1, 2):
        tasks = await asyncio.gather(a.task(), b.task())
        assert {t.round for t in tasks} == {number}
        assert {t.version for t in tasks} == {number - 1}
        for client, task, value, examples in ((b, tasks[1], 4.0, 30), (a, tasks[0], 8.0, 10)):
            await client.pull(task.run, task.version)
            await client.push(task.ticket, filled(value), examples)
        expected = {name: x + np.float32(5.0) for name, x in expected.items()}
        await daemon.until(run.id, lambda r, n=number: r.version == n)
        adapter = await daemon.adapter(run.id, number)
        assert all(np.array_equal(adapter[name], expected[name]) for name in expected)
    finished = await daemon.run(run.id)
    assert finished.state == run_pb2.RUN_STATE_COMPLETED


async def test_a_ticket_has_the_rate_of_its_round_and_no_schedule(daemon: Daemon) -> None:
    asked = {"learning_rate": 0.2, "schedule": "linear", "final_factor": 0.5, "clip_gradient_norm": 3.0}
    run = await daemon.create(config(rounds={"count": 3, "clients": 1}, training=asked))
    assert run.config.training.schedule == "linear"
    (a,) = await daemon.clients("a")
    for number, rate in ((1, 0.2), (2, 0.2 * 0.75), (3, 0.2 * 0.5)):
        task = await a.task()
        assert (task.round, task.settings.learning_rate) == (number, rate)
        assert task.settings.clip_gradient_norm == 3.0
        assert not any(map(task.settings.HasField, ("schedule", "warmup_rounds", "final_factor", "schedule_drops")))
        await a.push(task.ticket, filled(1.0))
        await daemon.until(run.id, lambda r, n=number: r.version == n)


async def test_a_committed_round_says_who_sent_what_and_how_many_bytes(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    a, b = await daemon.clients("a", "b")
    for client, task in zip((a, b), await asyncio.gather(a.task(), b.task()), strict=True):
        await client.pull(task.run, task.version)
        await client.push(task.ticket, filled(1.0), 10 if client is a else 30)
    await daemon.until(run.id, lambda r: r.version == 1)
    (done,) = await daemon.rounds(run.id)
    assert done.phase == run_pb2.ROUND_PHASE_COMMITTED
    assert [(t.client, t.weight, t.examples) for t in done.tickets] == [("a", 0.25, 10), ("b", 0.75, 30)]
    size = 4 * SPEC.parameters
    assert (done.payload_bytes_up, done.payload_bytes_down) == (2 * size, 2 * size)
    assert done.wire_bytes_up > 2 * size
    assert done.wire_bytes_down > 2 * size
    np.testing.assert_allclose(done.tickets[0].update_norm, SPEC.parameters**0.5)
    record.verify_chain([done.record])
    assert record.digest(done.record) == done.record_sha256
    assert [c["client"] for c in json.loads(done.record)["contributions"]] == ["a", "b"]


async def test_a_restarted_daemon_goes_on_with_the_same_tickets(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    a, b = await daemon.clients("a", "b")
    before = await asyncio.gather(a.task(), b.task())
    receipt = await a.push(before[0].ticket, filled(1.0))
    await daemon.end()
    daemon = await start()
    a, b = await daemon.clients("a", "b")
    assert await a.push(before[0].ticket, filled(1.0)) == receipt
    assert (await b.task()).ticket == before[1].ticket
    await b.push(before[1].ticket, filled(3.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    adapter = await daemon.adapter(run.id, 1)
    assert all((x == 2.0).all() for x in adapter.values())


async def test_a_round_is_folded_while_the_files_of_the_one_before_are_still_being_removed(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def slowly(*_: object) -> None:
        await release.wait()

    monkeypatch.setattr(daemon.server.store, "forget_round", slowly)
    run = await daemon.create(config(rounds={"count": 2, "clients": 1}))
    (a,) = await daemon.clients("a")
    for number in (1, 2):
        task = await a.task()
        await a.push(task.ticket, filled(1.0))
        assert (await daemon.until(run.id, lambda r, n=number: r.version == n)).version == number
    release.set()


async def test_what_is_kept_of_a_round_is_what_was_counted(start: StartDaemon) -> None:
    daemon = await start(keep_updates=True)
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "over_selection": 1.0}))
    a, b = await daemon.clients("a", "b")
    counted, late = await asyncio.gather(a.task(), b.task())
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    assert await refused(b.push_raw(header(late.ticket, manifest), [(0, data[:9])])) == "UPLOAD_INCOMPLETE"
    spool = daemon.server.settings.data_dir / "spool"
    assert [path.suffix for path in spool.glob(f"{late.ticket}.*")] == [".part"]
    await a.push(counted.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    await daemon.end()
    assert {path.name.partition(".")[0] for path in spool.iterdir()} == {counted.ticket}


async def test_a_newer_wait_takes_the_place_of_the_older_one(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    a, b = await daemon.clients("a", "b")
    for client in (a, b):
        assert (await client.look()).offer.run.id == run.id
        assert (await client.look()).offer.run.id == run.id, "an offer comes again until it is answered"
        await client.answer(run.id)
    older = asyncio.create_task(a.look())
    async with asyncio.timeout(10):
        while not daemon.server.runs.lobby.is_waiting("a"):
            await asyncio.sleep(0.01)
    newer = asyncio.create_task(a.look())
    async with asyncio.timeout(10):
        assert (await older).HasField("idle")
        ticket = (await b.look()).training.ticket
        assert (await newer).HasField("training")
    assert (await b.look()).training.ticket == ticket, "an open ticket is given again"
