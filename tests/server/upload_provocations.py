"""Ways to provoke the reasons of uploads, for the first table of docs/errors.md."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.adapters import payload
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import tensor_pb2
from fedpeft_server.timing import TIMING
from fedpeft_server.uploads import chunk_receiver, pipeline, transfer_slots

from .conftest import SPEC, RawClient, filled, header
from .provoked_world import World
from .uploads.test_refusals import REFUSED_FOR_GOOD, TRY_AGAIN, WRONG_HEADERS, bad_and_good
from .uploads.test_transfer_slots import Trickle
from .uploads.test_uploads import SlowDisk


def update(case: str) -> Callable[[World], Awaitable[object]]:
    """One of the wrong updates of test_refusals."""
    send, _ = {**REFUSED_FOR_GOOD, **WRONG_HEADERS, **TRY_AGAIN}[case]

    async def provoke(world: World) -> object:
        bad, *_ = await bad_and_good(await world.start())
        return await send(bad)

    return provoke


async def another_update(world: World) -> object:
    bad, *_ = await bad_and_good(await world.start())
    await bad.values(1.0)
    return await bad.values(2.0)


async def excluded_update(world: World) -> object:
    daemon, run, (client, other) = await world.run(2)
    tasks = await asyncio.gather(client.task(), other.task())
    await asyncio.gather(client.push(tasks[0].ticket, filled(3e38)), other.push(tasks[1].ticket, filled(1.0)))
    await daemon.until(run, lambda r: r.version == 1)
    return await client.push(tasks[0].ticket, filled(3e38))


async def withdrawn_ticket(world: World) -> object:
    _, _, (client,) = await world.run()
    task = await client.task()
    await client.withdraw(task.ticket)
    return await client.push(task.ticket, filled(1.0))


async def ticket_of_another(world: World) -> object:
    bad, _, ticket, _ = await bad_and_good(await world.start())
    return await bad.client.push(ticket, filled(1.0))


async def large_update(world: World) -> object:
    daemon = await world.start(max_update_bytes=1024)
    spec = type(SPEC).of("bias", [type(SPEC.tensors[0])("w", (300,))])
    return await daemon.create(spec=spec)


async def begun(client: RawClient, ticket: str, chunk_bytes: int, held: asyncio.Event) -> object:
    """Begins an upload and sends nothing more until `held` is set."""
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")

    async def requests() -> AsyncIterator[fed.PushUpdateRequest]:
        yield fed.PushUpdateRequest(header=header(ticket, manifest))
        yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=0, data=data[:chunk_bytes]))
        await held.wait()

    return await client.send(requests())


async def busy_server(world: World) -> object:
    world.monkeypatch.setattr(transfer_slots, "HOLD_S", 0.2)
    daemon, _, (a, b) = await world.run(2, max_transfers=1)
    tasks = await asyncio.gather(a.task(), b.task())
    held = asyncio.Event()
    first = asyncio.create_task(begun(a, tasks[0].ticket, 9, held))
    async with asyncio.timeout(10):
        while not (await a.upload(tasks[0].ticket)).state or not daemon.server.store.spool._writers:
            await asyncio.sleep(0.01)
    try:
        return await b.push(tasks[1].ticket, filled(1.0))
    finally:
        held.set()
        await asyncio.gather(first, return_exceptions=True)


async def slow_upload(world: World) -> object:
    _, _, (a, b) = await world.run(2, max_transfers=1, timing=replace(TIMING, transfer_turn_s=0.0))
    tasks = await asyncio.gather(a.task(), b.task())
    trickle = Trickle(a, tasks[0].ticket)
    first = asyncio.create_task(trickle.push())
    await trickle.begun()
    await b.push(tasks[1].ticket, filled(1.0))
    return await first


async def slow_disk(world: World) -> object:
    world.monkeypatch.setattr(pipeline, "HOLD_S", 0.1)
    _, _, (client,) = await world.run()
    task = await client.task()
    disk = SlowDisk(world.monkeypatch)
    try:
        return await client.push(task.ticket, filled(1.0))
    finally:
        disk.go.set()


async def silent_client(world: World) -> object:
    world.monkeypatch.setattr(chunk_receiver, "STALL_S", 0.2)
    _, _, (client,) = await world.run()
    return await begun(client, (await client.task()).ticket, 9, asyncio.Event())


async def full_disk(world: World) -> object:
    disk: Path = world.request.getfixturevalue("small_disk")
    _, _, (client,) = await world.run(folder=disk)
    task = await client.task()
    ballast = disk / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    with pytest.raises(OSError, match="No space left"):
        await asyncio.to_thread(fill)
    try:
        return await client.push(task.ticket, filled(1.0))
    finally:
        await asyncio.to_thread(ballast.unlink)


async def lost_spool(world: World) -> object:
    """The server's own folder is gone: the client keeps its update until the operator has mended that."""
    daemon, _, (client,) = await world.run()
    task = await client.task()
    (daemon.server.settings.data_dir / "spool").rmdir()
    return await client.push(task.ticket, filled(1.0))
