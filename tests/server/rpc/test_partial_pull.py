"""A pull sends what changed since the version that the client holds; the bytes are counted where they pass."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op

from ..conftest import Arrays, Daemon, RawClient, config, refused

TURNS = (TensorRole.SENT, TensorRole.FROZEN)
SPEC = AdapterSpec(
    "bias",
    (
        TensorSpec("a", (500,), TURNS[::-1]),
        TensorSpec("b", (700,), TURNS),
        TensorSpec("fixed", (40,), (TensorRole.FROZEN,)),
        TensorSpec("head", (3,)),
    ),
)
SIZES = {tensor.name: 4 * tensor.size for tensor in SPEC.tensors}
WHOLE, A, B = sum(SIZES.values()), SIZES["a"] + SIZES["head"], SIZES["b"] + SIZES["head"]


class Holder:
    """A client that completes versions from the one that it holds, as the protos say."""

    def __init__(self, raw: RawClient) -> None:
        self.raw = raw
        self.version, self.payload, self.sha256 = 0, b"", b""

    async def pull(self, run: str, version: int, *, announces: bool = True) -> int:
        """Pulls a version; returns the bytes that came."""
        request = fed.PullAdapterRequest(run=run, version=version, have_sha256=self.sha256)
        if announces and self.payload:
            request.have_version = self.version
        parts = [part async for part in self.raw.stub.PullAdapter(request, metadata=self.raw.metadata)]
        header, data = parts[0].header, b"".join(part.chunk.data for part in parts[1:])
        manifest = wire.manifest_from_proto(header.manifest)
        assert manifest.payload_bytes == WHOLE, "the manifest is of all tensors"
        whole, at = bytearray(self.payload or bytes(WHOLE)), 0
        for i in header.tensors or (range(4) if data else ()):
            entry = manifest.entries[i]
            whole[entry.offset : entry.offset + entry.length] = data[at : at + entry.length]
            at += entry.length
        assert at == len(data)
        self.version, self.payload, self.sha256 = version, bytes(whole), manifest.sha256
        return len(data)

    def arrays(self) -> Arrays:
        found, at = {}, 0
        for tensor in SPEC.shared:
            found[tensor.name] = np.frombuffer(self.payload, np.float32, tensor.size, at)
            at += 4 * tensor.size
        return found


async def rounds_of(daemon: Daemon, count: int) -> str:
    """Holds `count` rounds, each of which adds its number to what it sends."""
    created = await daemon.create(config(rounds={"count": count + 1, "clients": 1, "quorum": 1}), SPEC)
    (client,) = await daemon.clients("trainer")
    for number in range(1, count + 1):
        task = await client.task(created.id)
        changes = {t.name: np.full(t.shape, number, np.float32) for t in SPEC.sent(number)}
        spec = AdapterSpec(SPEC.method, SPEC.sent(number))
        await client.push(task.ticket, changes, spec=AdapterSpec(spec.method, tuple(map(always, spec.tensors))))
        await daemon.until(created.id, lambda run, version=number: run.version == version)  # type: ignore[misc]
    return created.id


def always(tensor: TensorSpec) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.shape)


@pytest.fixture
async def holder(daemon: Daemon) -> Holder:
    raw = daemon.client("holder")
    await raw.register(fed.CLIENT_ROLE_EVALUATOR)
    return Holder(raw)


async def test_what_changed_completes_what_is_held(daemon: Daemon, holder: Holder) -> None:
    run = await rounds_of(daemon, 4)
    found = [await holder.pull(run, version) for version in (0, 1, 2, 4, 4, 3, 0)]
    assert found == [WHOLE, B, A, A + SIZES["b"], 0, A, A + SIZES["b"]]
    await holder.pull(run, 4)
    values = {name: set(array.tolist()) for name, array in holder.arrays().items()}
    assert values == {"a": {2 + 4}, "b": {1 + 3}, "fixed": {0}, "head": {1 + 2 + 3 + 4}}


async def test_a_rollback_costs_what_it_takes_back(daemon: Daemon, holder: Holder) -> None:
    run = await rounds_of(daemon, 3)
    await holder.pull(run, 3)
    await daemon.operator.RollbackRun(op.RollbackRunRequest(run=run, version=2))
    assert await holder.pull(run, 4) == B, "round 3 changed b and the head"
    values = {name: set(array.tolist()) for name, array in holder.arrays().items()}
    assert values == {"a": {2}, "b": {1}, "fixed": {0}, "head": {1 + 2}}
    assert await holder.pull(run, 2) == 0, "the same bytes"


async def test_a_client_that_does_not_say_what_it_holds_gets_all(daemon: Daemon, holder: Holder) -> None:
    run = await rounds_of(daemon, 2)
    assert [await holder.pull(run, version, announces=False) for version in (0, 1, 2, 2)] == [WHOLE] * 3 + [0]


async def test_bytes_are_counted_as_they_pass(daemon: Daemon) -> None:
    created = await daemon.create(config(rounds={"count": 2, "clients": 2, "quorum": 2}), SPEC)
    holders = [Holder(client) for client in await daemon.clients("x", "y")]
    for number in (1, 2):
        tasks = await asyncio.gather(*(each.raw.task(created.id) for each in holders))
        budget = daemon.server.metrics.round_budget_bytes
        found = {each: budget.labels(created.id, each)._value.get() for each in ("down", "up")}
        # Downwards to those who hold the version before: in round 2 what round 1 changed.
        assert found == ({"down": 2 * WHOLE, "up": 2 * B} if number == 1 else {"down": 2 * B, "up": 2 * A})
        for each, task in zip(holders, tasks, strict=True):
            assert task.version == number - 1
            await each.pull(created.id, task.version)
            zeros = {t.name: np.full(t.shape, 0.5, np.float32) for t in SPEC.sent(number)}
            await each.raw.push(task.ticket, zeros, spec=AdapterSpec("bias", tuple(map(always, SPEC.sent(number)))))
        await daemon.until(created.id, lambda run, version=number: run.version == version)  # type: ignore[misc]
    rounds = await daemon.rounds(created.id)
    assert [each.payload_bytes_down for each in rounds] == [2 * WHOLE, 2 * B]
    assert [each.payload_bytes_up for each in rounds] == [2 * B, 2 * A]


async def test_a_part_is_continued_and_ends_where_it_ends(daemon: Daemon, holder: Holder) -> None:
    run = await rounds_of(daemon, 1)
    await holder.pull(run, 0)
    request = fed.PullAdapterRequest(run=run, version=1, have_version=0, have_sha256=holder.sha256)
    parts = [part async for part in holder.raw.stub.PullAdapter(request, metadata=holder.raw.metadata)]
    request.offset = 2801  # in the middle of the last value of b, before the head
    rest = [part async for part in holder.raw.stub.PullAdapter(request, metadata=holder.raw.metadata)]
    assert rest[0] == parts[0] and list(rest[0].header.tensors) == [1, 3]
    assert b"".join(part.chunk.data for part in rest[1:]) == b"".join(part.chunk.data for part in parts[1:])[2801:]
    assert [part.chunk.offset for part in rest[1:]] == [2801]
    request.offset = B + 1

    async def beyond() -> None:
        _ = [part async for part in holder.raw.stub.PullAdapter(request, metadata=holder.raw.metadata)]

    assert await refused(beyond()) == "OFFSET_OUT_OF_RANGE"


async def test_chunks_are_shared_by_those_who_pull_the_same_part(daemon: Daemon) -> None:
    run = await rounds_of(daemon, 3)
    holders = [Holder(client) for client in await daemon.clients(*"uvwxyz")]
    for each in holders[:3]:
        await each.pull(run, 0)
    for each in holders[3:]:
        await each.pull(run, 1)
    reads = 0
    read = daemon.server.store.read_file

    async def counted(*args: object) -> bytes:
        nonlocal reads
        reads += 1
        return await read(*args)  # type: ignore[arg-type]

    daemon.server.store.read_file = counted  # type: ignore[method-assign]
    for each in holders:  # those of version 0 need both halves, those of version 1 too: rounds 2 and 3
        await each.pull(run, 3)
    assert reads == 1
    for each in (holders[0], holders[1]):
        await each.pull(run, 2)
    assert reads == 2
