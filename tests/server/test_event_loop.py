"""The event loop waits for no disk: it touches no file, takes no lock that a slow disk holds, and runs no SQL."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import tensor_pb2
from fedpeft_server.store.transactions import Transactions

from .conftest import Daemon, RawClient, StartDaemon, config, filled, header

LARGE = AdapterSpec.of("bias", [TensorSpec("head.weight", (256, 1024))])
MANIFEST, DATA = payload.encode(filled(1.0, LARGE), LARGE.sent(1), "float32")
PIECE = 256 * 1024

SYSTEM_CALLS = ("pread", "pwrite", "fsync", "fdatasync", "ftruncate", "unlink", "rename", "replace", "close")
EVENTS = ("open", "os.remove", "os.rename", "os.truncate", "os.listdir", "os.scandir", "os.mkdir", "shutil.rmtree")


class Guard:
    """Notes what is done with files, locks of files and the database on one thread."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self.folder = ""
        self.calls = 0
        self.found: list[str] = []

    def note(self, what: str) -> None:
        if self.thread is None:
            return
        self.calls += 1
        if threading.get_ident() == self.thread:
            self.found.append(what + "\n" + "".join(traceback.format_stack(limit=12)[:-2]))

    def audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.thread is not None and event in EVENTS and str(arguments[0]).startswith(self.folder):
            self.note(f"{event} {arguments[0]}")


GUARD = Guard()
sys.addaudithook(GUARD.audited)  # for as long as the process lives, so it does nothing outside the test


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guard]:
    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if not name.startswith("hashlib") or sum(len(each) for each in arguments if isinstance(each, bytes)) > 4096:
                GUARD.note(name)
            return function(*arguments, **options)

        return call

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, noted(f"os.{name}", getattr(os, name)))
    monkeypatch.setattr(hashlib, "sha256", noted("hashlib.sha256", hashlib.sha256))
    monkeypatch.setattr(hashlib, "file_digest", noted("a file's digest", hashlib.file_digest))
    monkeypatch.setattr(Transactions, "begin", noted("a transaction", Transactions.begin))
    monkeypatch.setattr(Transactions, "read", noted("a transaction", Transactions.read))
    GUARD.found, GUARD.calls = [], 0
    yield GUARD
    GUARD.thread = None


async def chunks(start: int, end: int, *, stand_still: bool = False) -> AsyncIterator[fed.PushUpdateRequest]:
    for at in range(start, end, PIECE):
        yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=at, data=DATA[at : at + PIECE]))
    if stand_still:
        await asyncio.Event().wait()


async def upload(client: RawClient, ticket: str, start: int, end: int, *, stand_still: bool = False) -> Any:
    async def requests() -> AsyncIterator[fed.PushUpdateRequest]:
        yield fed.PushUpdateRequest(header=header(ticket, MANIFEST))
        async for chunk in chunks(start, end, stand_still=stand_still):
            yield chunk

    return await client.send(requests())


async def until_held(client: RawClient, ticket: str, position: int) -> None:
    async with asyncio.timeout(20):
        while (await client.upload(ticket, MANIFEST.sha256)).committed_bytes != position:
            await asyncio.sleep(0.01)


async def hold_a_round(daemon: Daemon, run: str, a: RawClient, b: RawClient) -> None:
    """One client uploads in one go, the other's connection breaks, and it resumes; both had downloaded."""
    tasks = await asyncio.gather(a.task(run), b.task(run))
    await asyncio.gather(a.pull(run, tasks[0].version), b.pull(run, tasks[0].version))
    await a.pull(run, tasks[0].version, offset=PIECE)
    broken = asyncio.ensure_future(upload(b, tasks[1].ticket, 0, 2 * PIECE, stand_still=True))
    await until_held(b, tasks[1].ticket, 2 * PIECE)
    broken.cancel()
    await upload(a, tasks[0].ticket, 0, len(DATA))
    await upload(b, tasks[1].ticket, 2 * PIECE, len(DATA))
    await daemon.until(run, lambda r: r.version == tasks[0].round)


@pytest.mark.timed(traffic_write_s=0.05, payload_write_delay_s=0.05, storage_measure_s=0.05)
@pytest.mark.parametrize("blobs", ["folder", "s3"])
@pytest.mark.parametrize("down", ["float32", "float16"])
async def test_nothing_is_done_with_files_or_the_database_on_the_loop(
    start: StartDaemon, guard: Guard, blobs: str, down: str, request: pytest.FixtureRequest
) -> None:
    daemon = await start(blobs=request.getfixturevalue("s3") if blobs == "s3" else "")
    guard.folder, guard.thread = str(daemon.server.settings.data_dir), threading.get_ident()
    run = await daemon.create(config(rounds={"count": 3, "clients": 2}, codec={"down": down}), LARGE)
    a, b = await daemon.clients("a", "b")
    await hold_a_round(daemon, run.id, a, b)
    tasks = await asyncio.gather(a.task(run.id), b.task(run.id))
    broken = asyncio.ensure_future(upload(a, tasks[0].ticket, 0, PIECE, stand_still=True))
    await until_held(a, tasks[0].ticket, PIECE)
    await b.withdraw(tasks[1].ticket, "no time")
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    broken.cancel()
    async for _ in daemon.operator.DownloadAdapter(op.DownloadAdapterRequest(run=run.id)):
        pass
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))
    await asyncio.sleep(0.1)
    guard.thread = None
    assert guard.calls > 50, "it looks where it should"
    assert not guard.found, guard.found[0]


class SlowDisk:
    """A disk whose syncs and removals do not end before they are let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.waiting = threading.Semaphore(0)
        self.go_on = threading.Event()
        for name in names:
            monkeypatch.setattr(os, name, self._slow(getattr(os, name)))

    def _slow(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                self.waiting.release()
                assert self.go_on.wait(60)
            return function(*arguments, **options)

        return call

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.waiting.acquire, True, 20), "the disk was asked for something"


async def test_a_disk_that_does_not_answer_holds_up_no_other_call(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Syncs first, then the removal of a round's files: health, downloads and another upload go on meanwhile."""
    run = await daemon.create(config(rounds={"count": 2, "clients": 2, "quorum": 1, "deadline_s": 3600}), LARGE)
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    health = health_pb2_grpc.HealthStub(daemon.channel)
    disk = SlowDisk(monkeypatch, "fsync", "fdatasync", "unlink")
    pushing = asyncio.ensure_future(upload(a, tasks[0].ticket, 0, len(DATA)))
    await disk.reached()
    async with asyncio.timeout(20):
        await health.Check(health_pb2.HealthCheckRequest())
        await b.pull(run.id, 0)
        other = asyncio.ensure_future(upload(b, tasks[1].ticket, 0, PIECE, stand_still=True))
        await until_held(b, tasks[1].ticket, PIECE)
        other.cancel()
        assert (await daemon.run(run.id)).version == 0
    assert not pushing.done()
    disk.go_on.set()
    await pushing
    disk.go_on.clear()
    stopping = asyncio.ensure_future(daemon.operator.StopRun(op.StopRunRequest(run=run.id)))
    await disk.reached()
    async with asyncio.timeout(20):
        await stopping
        await health.Check(health_pb2.HealthCheckRequest())
        second = await daemon.operator.ListRuns(op.ListRunsRequest())
        assert len(second.runs) == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await upload(b, tasks[1].ticket, PIECE, len(DATA))
    disk.go_on.set()
    async with asyncio.timeout(20):
        while list((daemon.server.settings.data_dir / "spool").iterdir()):
            await asyncio.sleep(0.02)
