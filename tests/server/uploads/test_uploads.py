"""Uploads whose disk is slow, whose call is gone, or that come in crowds."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters import spec as specs
from fedpeft.errors import StoreUnavailable
from fedpeft.identity.subject import Role
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_server.access.bounds import CALLERS, RECEIVING
from fedpeft_server.store.spool import Spool
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.uploads import pipeline
from fedpeft_server.uploads.incoming import ReceiveSlots

from ..conftest import SPEC, Daemon, RawClient, config, filled, header, refused


class SlowDisk:
    """Finishing an upload waits until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.finishes = 0
        self.go = threading.Event()
        real = SpoolWriter.finish

        def finish(writer: SpoolWriter) -> Path:
            self.finishes += 1
            assert self.go.wait(20)
            return real(writer)

        monkeypatch.setattr(SpoolWriter, "finish", finish)

    async def reached(self) -> None:
        async with asyncio.timeout(10):
            while not self.finishes:
                await asyncio.sleep(0.01)


async def one_ticket(daemon: Daemon, count: int = 1) -> tuple[run_pb2.Run, RawClient, str]:
    run = await daemon.create(config(rounds={"count": count, "clients": 1}))
    (client,) = await daemon.clients("a")
    return run, client, (await client.task()).ticket


def open_files(folder: Path) -> list[str]:
    """Returns the files in a folder that this process has open, one entry a descriptor."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue  # the listing's own
    return [name for name in found if name.startswith(str(folder))]


async def test_a_repetition_joins_the_check_that_is_under_way(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    run, client, ticket = await one_ticket(daemon)
    monkeypatch.setattr(pipeline, "HOLD_S", 0.2)
    disk = SlowDisk(monkeypatch)
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    for chunks in ([(0, data)], [], [(0, data)]):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.push_raw(header(ticket, manifest), chunks)
        error = from_rpc_error(caught.value)
        assert (caught.value.code(), error.reason, error.retry_s) == (grpc.StatusCode.ABORTED, "BEING_CHECKED", 0.0)
    held = await client.upload(ticket, manifest.sha256)
    assert (held.state, held.committed_bytes) == (run_pb2.TICKET_STATE_ISSUED, len(data))
    assert await refused(client.push(ticket, filled(2.0))) == "BEING_CHECKED"
    other = asyncio.create_task(client.push(ticket, filled(2.0)))
    await asyncio.sleep(0.05)
    disk.go.set()
    receipt = await client.push_raw(header(ticket, manifest), [])
    assert receipt.sha256 == manifest.sha256
    assert await refused(other) == "UPDATE_DIFFERS", "its client must not add it to what it sends next"
    assert disk.finishes == 1
    await daemon.until(run.id, lambda r: r.version == 1)
    assert all((x == 1.0).all() for x in (await daemon.adapter(run.id, 1)).values())


async def test_an_update_whose_round_ends_while_it_is_looked_up_is_late_and_not_wrong(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = specs.TensorSpec("odd", (4,), (specs.TensorRole.SENT, specs.TensorRole.FROZEN))  # sent in every other round
    spec = type(SPEC).of("bias", [*SPEC.tensors, odd])
    run = await daemon.create(config(rounds={"count": 2, "clients": 1}), spec=spec)
    (client,) = await daemon.clients("a")
    ticket = (await client.task()).ticket
    looked_up, go_on, real = asyncio.Event(), asyncio.Event(), pipeline.Uploads._declared_by

    async def slow(self: pipeline.Uploads, name: str, run: str) -> int:
        if not looked_up.is_set():
            looked_up.set()
            await go_on.wait()
        return await real(self, name, run)

    monkeypatch.setattr(pipeline.Uploads, "_declared_by", slow)
    first = asyncio.create_task(client.push(ticket, filled(2.0, spec), spec=spec))
    await looked_up.wait()
    await client.push(ticket, filled(1.0, spec), spec=spec)
    await daemon.until(run.id, lambda r: r.version == 1)
    await client.task()
    go_on.set()
    assert await refused(first) == "ROUND_CLOSED"


@pytest.mark.parametrize("gone", ["before it is opened", "while it is opened"])
async def test_an_update_whose_files_went_with_its_round_after_they_were_whole_is_late(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """The server said an internal error, in its log and to the client."""
    run, client, ticket = await one_ticket(daemon)
    real, whole, go_on = pipeline._finish, threading.Event(), threading.Event()

    def finished(writer: SpoolWriter) -> None:
        real(writer)
        whole.set()
        assert go_on.wait(10)
        if gone == "while it is opened":  # the name was looked up, and the file is not there any more
            monkeypatch.setattr(Spool, "open", vanished)

    def vanished(_: Spool, ticket: str, sha256: bytes) -> None:
        raise StoreUnavailable(f"reading the update of {ticket} failed: No such file or directory")

    monkeypatch.setattr(pipeline, "_finish", finished)
    push = asyncio.create_task(client.push(ticket, filled(1.0)))
    assert await asyncio.to_thread(whole.wait, 10)
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    spool = daemon.server.settings.data_dir / "spool"
    async with asyncio.timeout(10):
        while any(spool.iterdir()):
            await asyncio.sleep(0.02)
    go_on.set()
    assert await refused(push) in ("ROUND_CLOSED", "TICKET_CLOSED", "RUN_FINISHED")


async def test_a_repetition_gets_the_refusal_of_the_check_that_is_under_way(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, ticket = await one_ticket(daemon)
    disk = SlowDisk(monkeypatch)
    first = asyncio.create_task(client.push(ticket, filled(float("nan"))))
    await disk.reached()
    again = asyncio.create_task(client.push(ticket, filled(float("nan"))))
    await asyncio.sleep(0.1)
    disk.go.set()
    assert [await refused(push) for push in (first, again)] == ["PAYLOAD_INVALID", "PAYLOAD_INVALID"]
    assert (await client.upload(ticket)).state == run_pb2.TICKET_STATE_REFUSED
    assert disk.finishes == 1


async def test_an_update_counts_though_its_client_leaves_while_it_is_checked(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, client, ticket = await one_ticket(daemon)
    disk = SlowDisk(monkeypatch)
    push = asyncio.create_task(client.push(ticket, filled(1.0)))
    await disk.reached()
    push.cancel()
    await asyncio.sleep(0.2)
    disk.go.set()
    done = await daemon.until(run.id, lambda r: r.version == 1)
    assert done.state == run_pb2.RUN_STATE_COMPLETED


async def test_where_an_upload_stands_is_answered_while_the_disk_is_busy(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client, ticket = await one_ticket(daemon)
    busy = threading.Event()
    blocks = [asyncio.create_task(daemon.server.store.compute(busy.wait, 20)) for _ in range(8)]
    try:
        async with asyncio.timeout(5):
            assert (await client.upload(ticket, bytes(32))).committed_bytes == 0
    finally:
        busy.set()
        await asyncio.gather(*blocks)


@pytest.mark.parametrize("leaves_during", ["writer", "finish"])
async def test_a_client_that_leaves_leaves_no_open_file(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, leaves_during: str
) -> None:
    _, client, ticket = await one_ticket(daemon)
    spool = daemon.server.store.spool
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()
    owner = spool if leaves_during == "writer" else SpoolWriter
    real = getattr(owner, leaves_during)

    def held(*args: object) -> object:
        begun.set()
        assert go.wait(20)
        try:
            return real(*args)
        finally:
            ended.set()

    monkeypatch.setattr(owner, leaves_during, held)
    folder = daemon.server.settings.data_dir / "spool"
    push = asyncio.create_task(client.push(ticket, filled(1.0)))
    await asyncio.to_thread(begun.wait, 10)
    push.cancel()
    await asyncio.sleep(0.3)
    go.set()
    monkeypatch.undo()
    await asyncio.to_thread(ended.wait, 10)
    await asyncio.sleep(0.2)
    assert open_files(folder) == []
    assert (await client.push(ticket, filled(1.0))).ticket == ticket


async def test_a_client_with_a_crowd_of_calls_is_told_so_and_others_are_served(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the test takes: a call that gave way would let in the one that is to be refused.
    monkeypatch.setattr(daemon.server.interceptor, "_slots", ReceiveSlots(replace(RECEIVING, hold_s=60.0)))
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    greedy, modest = await daemon.clients("greedy", "modest")
    streams = [greedy.stub.PushUpdate(metadata=greedy.metadata) for _ in range(100)]
    codes = asyncio.gather(*(stream.code() for stream in streams))
    async with asyncio.timeout(20):
        while sum(stream.done() for stream in streams) < len(streams) - CALLERS[Role.CLIENT].under_way:
            await asyncio.sleep(0.05)
        assert await refused(greedy.upload("ticket-none")) == "TOO_MANY_CALLS"
        _, data = await modest.pull(run.id, 0)
        assert len(data) == 4 * sum(t.size for t in SPEC.shared)
    for stream in streams:
        stream.cancel()
    ended = await codes
    assert ended.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == len(streams) - CALLERS[Role.CLIENT].under_way


def chunks_in_memory(data: bytes) -> int:
    """Returns how many views of messages with these bytes there are; those of other tests are not looked at."""
    # Not isinstance, which asks each object for its class: those that stand in for others warn, or load them.
    views = [each for each in gc.get_objects() if type(each) is memoryview and each.nbytes == len(data)]
    return sum(type(each.obj) is bytes and each == data for each in views)


async def test_no_chunk_of_a_counted_update_stays_in_memory(daemon: Daemon) -> None:
    """Nor does it wait there for the garbage collector, which comes rarely."""
    _, client, ticket = await one_ticket(daemon)
    manifest, data = payload.encode(filled(179.0), SPEC.sent(1), "float32")  # as in no other test
    messages = [
        pb.PushUpdateRequest(header=header(ticket, manifest)).SerializeToString(),
        pb.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=0, data=data)).SerializeToString(),
    ]
    push = daemon.channel.stream_unary(
        "/fedpeft.v1.FederationService/PushUpdate"
    )  # of bytes: no message is this side's
    gc.collect()
    gc.disable()
    try:
        await push(iter(messages), metadata=client.metadata)
        async with asyncio.timeout(10):  # the call's last steps may follow the receipt
            while chunks_in_memory(data):
                await asyncio.sleep(0.01)
        assert not chunks_in_memory(data)
    finally:
        gc.enable()
