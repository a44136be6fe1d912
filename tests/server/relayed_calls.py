"""Calls of an edge's agent on its server, without the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np

from fedpeft.adapters import payload
from fedpeft.config import RunConfig
from fedpeft.rpc import wire
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2, tensor_pb2

from .conftest import SPEC, Arrays, Daemon, RawClient, answered, config, zeros

EXACT = {"strategy": "fedavg", "exact_sum": True}
RUN = "run-parent000001"


def parents(count: int = 3, clients: int = 2) -> RunConfig:
    return config(rounds={"count": count, "clients": clients, "quorum": clients}, aggregation=EXACT)


def edges(count: int = 3, clients: int = 2, **rounds: object) -> RunConfig:
    of_edge = {"count": count, "clients": clients, "quorum": clients, "policy": "relayed", **rounds}
    return config(rounds=of_edge, aggregation=EXACT)


async def make(
    edge: Daemon, version: int, arrays: Arrays, run: str = RUN, made: RunConfig | None = None
) -> run_pb2.Run:
    manifest, data = payload.encode(arrays, SPEC.shared, "float32")
    header = op.CreateRunHeader(
        config=wire.config_to_proto(made or edges()),
        spec=wire.spec_to_proto(SPEC),
        backbone_fingerprint="ab" * 32,
        manifest=wire.manifest_to_proto(manifest),
        request_id=f"relay-{run}-{version}",
        relays=op.Relay(run=run, version=version, client="north"),
    )
    return (await edge.create_raw(header, [(0, data)])).run


async def supply(edge: Daemon, version: int, arrays: Arrays, run: str = RUN, client: str = "north") -> run_pb2.Run:
    manifest, data = payload.encode(arrays, SPEC.shared, "float32")

    async def requests() -> AsyncIterator[op.SupplyVersionRequest]:
        described = wire.manifest_to_proto(manifest)
        header = op.SupplyVersionHeader(run=run, version=version, manifest=described, client=client)
        yield op.SupplyVersionRequest(header=header)
        yield op.SupplyVersionRequest(chunk=tensor_pb2.Chunk(offset=0, data=data))

    return (await answered(edge.operator.SupplyVersion(requests()))).run


async def sum_of(edge: Daemon, number: int, run: str = RUN, offset: int = 0) -> tuple[op.DownloadSumHeader, bytes]:
    header, data = op.DownloadSumHeader(), bytearray()
    async for part in edge.operator.DownloadSum(op.DownloadSumRequest(run=run, round=number, offset=offset)):
        if part.HasField("header"):
            header = part.header
        else:
            data += part.chunk.data
    return header, bytes(data)


def update(client: int, number: int) -> Arrays:
    """A change of one client, in magnitudes that a sum in another order would round otherwise."""
    rng = np.random.default_rng([client, number])
    return {
        t.name: (rng.standard_normal(t.shape) * 10.0 ** rng.integers(-6, 2, t.shape)).astype(np.float32)
        for t in SPEC.sent(1)
    }


def ones() -> Arrays:
    return {name: np.ones_like(values) for name, values in zeros().items()}


async def train(clients: Sequence[tuple[int, RawClient]], number: int) -> None:
    tasks = await asyncio.gather(*(client.task() for _, client in clients))
    for (index, client), task in zip(clients, tasks, strict=True):
        assert (task.round, task.version) == (number, number - 1)
        await client.push(task.ticket, update(index, number), examples=10 + index)


async def committed(edge: Daemon, number: int, run: str = RUN) -> None:
    async with asyncio.timeout(10):
        while (await edge.run(run)).state == run_pb2.RUN_STATE_RUNNING:
            rounds = await edge.rounds(run)
            if any(each.number == number and each.record for each in rounds):
                return
            await asyncio.sleep(0.02)
