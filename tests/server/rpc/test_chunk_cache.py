"""Chunks that downloads share: a reading that failed is nobody else's answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from unittest.mock import patch

import grpc
import pytest

from fedpeft.errors import StateInvalid
from fedpeft.rpc import chunk_messages
from fedpeft.rpc.status import from_rpc_error
from fedpeft_server.rpc.chunk_cache import ChunkCache
from fedpeft_server.store.blobs.open_file import LateFile, OpenFile
from fedpeft_server.store.store import Store
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, config

DIGEST = b"\1" * 32
DATA = b"0123456789"
FAULTS = [StateInvalid("no bucket"), OSError("no disk"), RuntimeError("?")]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    (tmp_path / "data").mkdir()
    store = Store(tmp_path / "data", "", "", keep_updates=False, timing=TIMING)
    yield store
    await asyncio.to_thread(store.close)


@pytest.fixture
def good(tmp_path: Path) -> LateFile:
    (tmp_path / "payload").write_bytes(DATA)
    return LateFile(lambda: OpenFile(tmp_path / "payload"))


class Failing:
    """A file that cannot be opened, once it is let go."""

    def __init__(self, fault: Exception) -> None:
        self.begun, self.go, self.opened, self.fault = threading.Event(), threading.Event(), 0, fault
        self.file = LateFile(self._open)

    def _open(self) -> OpenFile:
        self.opened += 1
        self.begun.set()
        assert self.go.wait(20)
        raise self.fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
class TestAReadingThatFailed:
    async def test_is_not_kept(self, store: Store, good: LateFile, fault: Exception) -> None:
        cache, failing = ChunkCache(store), Failing(fault)
        failing.go.set()
        with pytest.raises(type(fault)):
            await cache.get(DIGEST, failing.file, 2, 3)
        assert not cache._readings
        assert await cache.get(DIGEST, good, 2, 3) == chunk_messages.write(2, b"234")

    async def test_is_not_the_answer_of_a_call_that_waited_for_it(
        self, store: Store, good: LateFile, fault: Exception
    ) -> None:
        cache, failing = ChunkCache(store), Failing(fault)
        own = asyncio.ensure_future(cache.get(DIGEST, failing.file, 2, 3))
        await asyncio.to_thread(failing.begun.wait, 20)
        waiting = [asyncio.ensure_future(cache.get(DIGEST, good, 2, 3)) for _ in range(3)]
        await asyncio.sleep(0)
        failing.go.set()
        with pytest.raises(type(fault)):
            await own
        assert [await each for each in waiting] == [chunk_messages.write(2, b"234")] * 3

    async def test_each_call_tries_its_own_file_once(self, store: Store, fault: Exception) -> None:
        cache, files = ChunkCache(store), [Failing(fault) for _ in range(3)]
        calls = [asyncio.ensure_future(cache.get(DIGEST, each.file, 2, 3)) for each in files]
        await asyncio.to_thread(files[0].begun.wait, 20)
        for each in files:
            each.go.set()
        failed = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(error) for error in failed] == [type(fault)] * 3
        assert [each.opened for each in files] == [1, 1, 1]
        assert not cache._readings

    async def test_is_not_kept_though_its_caller_left(self, store: Store, fault: Exception) -> None:
        """Nor is it reported to the event loop as a failure that nobody took."""
        cache, failing, unhandled = ChunkCache(store), Failing(fault), list[object]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        call = asyncio.ensure_future(cache.get(DIGEST, failing.file, 2, 3))
        await asyncio.to_thread(failing.begun.wait, 20)
        call.cancel()
        failing.go.set()
        async with asyncio.timeout(20):
            while cache._readings:
                await asyncio.sleep(0.01)
        assert not unhandled


async def test_a_bucket_that_failed_once_serves_the_next_download(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    await a.task()
    with (
        patch.object(daemon.server.store.download_cache, "open", side_effect=StateInvalid("no bucket")),
        pytest.raises(grpc.aio.AioRpcError) as failed,
    ):
        await a.pull(run.id, 0)
    assert from_rpc_error(failed.value).reason == "INTERNAL"
    assert (await a.pull(run.id, 0))[1]
