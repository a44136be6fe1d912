"""The end of a daemon: waits end at once, a transfer under way is let finish, and nothing else holds it up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedpeft.adapters import payload
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import tensor_pb2

from .conftest import SPEC, StartDaemon, config, filled, header, refused

SOON_S = 3.0


async def test_waits_hold_no_daemon_up(start: StartDaemon) -> None:
    daemon = await start(drain_s=20.0)
    run = await daemon.create(config())
    (client,) = await daemon.clients("a")
    watch = daemon.operator.WatchRun(op.WatchRunRequest(run=run.id))
    health = health_pb2_grpc.HealthStub(daemon.channel).Watch(health_pb2.HealthCheckRequest())
    asked = asyncio.Event()

    async def questions() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        await asked.wait()

    reflection = reflection_pb2_grpc.ServerReflectionStub(daemon.channel).ServerReflectionInfo(questions())
    for stream in (watch, health, reflection):
        assert await stream.read() is not grpc.aio.EOF
    waiting = asyncio.create_task(refused(client.wait()))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    await daemon.end()
    assert time.monotonic() - began < SOON_S
    assert await waiting == "DRAINING"
    assert await refused(_rest(watch)) == "DRAINING"
    asked.set()


async def _rest(stream: grpc.aio.UnaryStreamCall[op.WatchRunRequest, op.WatchRunResponse]) -> None:
    while await stream.read() is not grpc.aio.EOF:
        continue


async def test_a_transfer_under_way_is_let_finish_and_those_in_line_come_back_later(start: StartDaemon) -> None:
    daemon = await start(drain_s=20.0, max_transfers=1)
    await daemon.create(config(rounds={"count": 1, "clients": 2}))
    clients = await daemon.clients("a", "b")
    tasks = await asyncio.gather(*(client.task() for client in clients))
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    go_on = asyncio.Event()

    async def slowly() -> AsyncIterator[fed.PushUpdateRequest]:
        yield fed.PushUpdateRequest(header=header(tasks[0].ticket, manifest))
        await go_on.wait()
        yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=0, data=data))

    upload = clients[0].stub.PushUpdate(slowly(), metadata=clients[0].metadata)
    await upload.initial_metadata()  # its turn has come
    in_line = asyncio.create_task(refused(clients[1].push(tasks[1].ticket, filled(2.0))))
    await asyncio.sleep(0.2)
    began = time.monotonic()
    ending = asyncio.create_task(daemon.end())
    assert await in_line == "DRAINING"
    await asyncio.sleep(0.3)
    assert not ending.done(), "an upload is under way"
    go_on.set()
    assert (await upload).ticket == tasks[0].ticket
    await ending
    assert time.monotonic() - began < SOON_S
