"""Participation that are streams: of gRPC's own services too, and to clients that do not read them."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.rpc.operator import Operator
from fedpeft_server.runs.engine import RunEngine

from ..conftest import Daemon, StartDaemon, refused


async def test_health_can_be_watched(daemon: Daemon) -> None:
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(5):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_a_client_that_does_not_read_what_it_pulls_keeps_nobody_else_waiting(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft_server.rpc.interceptors.STALL_S", 1.0)
    large = AdapterSpec.of("bias", [TensorSpec("head.weight", (6_000_000,))])
    daemon = await start(max_transfers=1)
    run = await daemon.create(spec=large, arrays={"head.weight": np.zeros(6_000_000, np.float32)})
    deaf, a = await daemon.clients("deaf", "a")
    call = deaf.stub.PullAdapter(fed.PullAdapterRequest(run=run.id), metadata=deaf.metadata)
    await call.read()
    await asyncio.sleep(0.3)
    async with asyncio.timeout(10):
        _, data = await a.pull(run.id, 0)
    assert len(data) == 24_000_000

    async def drained() -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    async with asyncio.timeout(10):
        assert await refused(drained()) == "TRANSFER_STALLED"


async def test_a_watch_tells_the_end_of_a_run_that_ends_while_the_watcher_is_told(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await daemon.create()
    shown = Operator._run

    async def ending(self: Operator, engine: RunEngine) -> run_pb2.Run:
        message = await shown(self, engine)
        if engine.active:
            await engine.stop("enough", "local")
        return message

    monkeypatch.setattr(Operator, "_run", ending)
    async with asyncio.timeout(5):
        told = [news.run.state async for news in daemon.operator.WatchRun(op.WatchRunRequest(run=run.id))]
    assert told == [run_pb2.RUN_STATE_RUNNING, run_pb2.RUN_STATE_STOPPED]
