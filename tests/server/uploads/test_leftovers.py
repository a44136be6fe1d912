"""Bytes that arrived and nobody wants any more are removed while the server lives; encoded versions are bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.store.blobs import download_cache

from ..conftest import Daemon, StartDaemon, config, filled
from ..test_event_loop import DATA, LARGE, PIECE, until_held, upload


def spooled(daemon: Daemon) -> list[Path]:
    return list((daemon.server.settings.data_dir / "spool").iterdir())


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():
            await asyncio.sleep(0.02)


async def test_nothing_stays_of_uploads_whose_round_closed_before_they_were_whole(start: StartDaemon) -> None:
    """One is in the middle of its upload, one waits for its turn, as another's update closes the round."""
    daemon = await start(max_transfers=2)
    run = await daemon.create(config(rounds={"count": 2, "clients": 2, "over_selection": 1.0}), LARGE)
    a, b, c, d = await daemon.clients("a", "b", "c", "d")
    tasks = await asyncio.gather(a.task(), b.task(), c.task(), d.task())
    await upload(d, tasks[3].ticket, 0, len(DATA))
    middle = asyncio.ensure_future(upload(b, tasks[1].ticket, 0, PIECE, stand_still=True))
    await until_held(b, tasks[1].ticket, PIECE)
    first = asyncio.ensure_future(upload(a, tasks[0].ticket, 0, PIECE, stand_still=True))
    await until_held(a, tasks[0].ticket, PIECE)
    waiting = asyncio.ensure_future(upload(c, tasks[2].ticket, 0, len(DATA)))
    await asyncio.sleep(0.1)
    first.cancel()
    going_on = asyncio.ensure_future(upload(a, tasks[0].ticket, PIECE, len(DATA)))
    await daemon.until(run.id, lambda r: r.version == 1)
    middle.cancel()
    ends = await asyncio.gather(waiting, going_on, return_exceptions=True)
    (late,) = (end for end in ends if isinstance(end, grpc.aio.AioRpcError))
    assert from_rpc_error(late).reason == "ROUND_CLOSED"
    await until(lambda: not spooled(daemon))


@pytest.mark.parametrize("end", ["stop", "withdraw", "break after the stop"])
async def test_nothing_stays_of_a_ticket_that_is_over(daemon: Daemon, end: str) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}), LARGE)
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await upload(b, tasks[1].ticket, 0, len(DATA))
    half = asyncio.ensure_future(upload(a, tasks[0].ticket, 0, PIECE, stand_still=True))
    await until_held(a, tasks[0].ticket, PIECE)
    if end == "withdraw":
        half.cancel()
        await a.withdraw(tasks[0].ticket)
        await until(lambda: [path.suffix for path in spooled(daemon)] == [".update"])
        return
    if end == "stop":
        half.cancel()
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    half.cancel()
    await until(lambda: not spooled(daemon))
    with pytest.raises(grpc.aio.AioRpcError):
        await upload(a, tasks[0].ticket, PIECE, len(DATA))
    assert not spooled(daemon)


async def test_encoded_versions_are_bounded_and_served_all_the_same(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_cache, "OWN_BYTES", 1000)
    rounds = {"count": 3, "clients": 1}
    run = await daemon.create(config(rounds=rounds, codec={"down": "float16"}), LARGE)
    (a,) = await daemon.clients("a")
    for _ in range(2):
        task = await a.task()
        await a.push(task.ticket, filled(1.0, LARGE), spec=LARGE)
        await daemon.until(run.id, lambda r, number=task.round: r.version == number)  # type: ignore[misc]
    first = [await a.pull(run.id, version) for version in (0, 1, 2)]
    again = await asyncio.gather(*(a.pull(run.id, version) for version in (0, 1, 2)), return_exceptions=True)
    assert first[0][1] != first[1][1] != first[2][1]
    served = [answer for answer in again if not isinstance(answer, BaseException)]
    assert all(answer[1] == first[answer[0].version][1] for answer in served) and served
    assert len(list((daemon.server.settings.data_dir / "outbound").iterdir())) == 1


@pytest.mark.timed(files_retry_s=0.05)
@pytest.mark.parametrize("end", ["a last round", "a stop"])
async def test_a_file_that_cannot_be_removed_is_tried_again_and_health_stays(start: StartDaemon, end: str) -> None:
    daemon = await start()
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "over_selection": 1.0}), LARGE)
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    half = asyncio.ensure_future(upload(b, tasks[1].ticket, 0, PIECE, stand_still=True))
    await until_held(b, tasks[1].ticket, PIECE)
    half.cancel()
    (part,) = spooled(daemon)
    part.unlink()
    part.mkdir()
    if end == "a stop":
        await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    else:
        await a.push(tasks[0].ticket, filled(1.0, LARGE), spec=LARGE)
        await daemon.until(run.id, lambda r: r.version == 1)
    failures = partial(
        daemon.server.metrics.registry.get_sample_value, "fedpeft_background_failures_total", {"work": "files"}
    )
    await until(lambda: (failures() or 0) >= 3)
    assert daemon.server.background.healthy
    assert spooled(daemon) == [part]
    part.rmdir()
    await until(lambda: not daemon.server.store.spool._unwanted)
    assert daemon.server.background.healthy and not daemon.server.store.spool.tickets()
