"""Versions on their way out: one that is slow to come keeps nobody waiting but those who want it."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters.adapter_file import AdapterInfo, write_adapter
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.errors import StoreUnavailable
from fedpeft_server.store.blobs import download_cache
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.blobs.download_cache import DownloadCache
from fedpeft_server.store.blobs.open_file import LateFile, OpenFile
from fedpeft_server.store.rows import RunRow, VersionRow
from fedpeft_server.store.store import FILE_THREADS, VERSION_THREADS, Store, version_key
from fedpeft_server.timing import TIMING

from ..rows import CONFIG, RUN, run_row

SPEC = AdapterSpec.of("bias", [TensorSpec("head.weight", (4, 4))])
FLOAT16 = CONFIG.model_copy(update={"codec": CONFIG.codec.model_copy(update={"down": "float16"})})
RUNS = {"float16": run_row(spec=SPEC, config=FLOAT16), "float32": run_row(spec=SPEC)}


class Slow(Blobs):
    """A folder of blobs, of which one is slow to come."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.slow, self.asked, self.go, self.fetched = "", threading.Event(), threading.Event(), 0

    @contextmanager
    def local(self, key: str) -> Iterator[Path]:
        self.fetched += 1
        if key == self.slow:
            self.asked.set()
            assert self.go.wait(20)
        with super().local(key) as path:
            yield path


@pytest.fixture
def blobs(tmp_path: Path) -> Slow:
    return Slow(tmp_path / "blobs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbound"


@pytest.fixture
def versions(folder: Path, blobs: Slow) -> DownloadCache:
    return DownloadCache(folder, blobs)


@pytest.fixture
def pool(blobs: Slow) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool
        blobs.go.set()


def put(blobs: Blobs, number: int) -> tuple[VersionRow, str]:
    """Stores a version all of whose values are its number; returns its row and its key."""
    file = io.BytesIO()
    info = AdapterInfo(RUN, number, "bias", "f" * 64, "vit_tiny", ("a", "b"))
    written = write_adapter(file, info, SPEC.shared, {"head.weight": np.full((4, 4), number, np.float32)})
    key = version_key(RUN, number)
    blobs.put(key, file.getvalue())
    return VersionRow(RUN, number, written.sha256, written.size_bytes, "", 1.0), key


def content(file: OpenFile) -> list[float]:
    with_float16 = file.read(0, 32)
    file.close()
    return sorted(set(np.frombuffer(with_float16, np.float16).tolist()))


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_version_that_is_slow_to_come_keeps_no_other_waiting(
    versions: DownloadCache, blobs: Slow, pool: ThreadPoolExecutor, run: RunRow
) -> None:
    (slow, key), (quick, other) = put(blobs, 1), put(blobs, 2)
    blobs.slow = key
    coming = [pool.submit(versions.open, run, slow, key) for _ in range(2)]
    assert blobs.asked.wait(20)
    assert pool.submit(versions.encoded, run, quick, other).result(20).row == quick
    pool.submit(versions.open, run, quick, other).result(20).close()
    pool.submit(versions.keep_from, RUN, 1).result(20)
    pool.submit(versions.forget, "run-another").result(20)
    assert not any(each.done() for each in coming)
    blobs.go.set()
    for each in coming:
        each.result(20).close()


def test_threads_that_want_one_version_encode_it_once(
    versions: DownloadCache, blobs: Slow, pool: ThreadPoolExecutor, folder: Path
) -> None:
    version, key = put(blobs, 1)
    blobs.slow = key
    coming = [pool.submit(versions.open, RUNS["float16"], version, key) for _ in range(4)]
    assert blobs.asked.wait(20)
    blobs.go.set()
    assert [content(each.result(20)) for each in coming] == [[1.0]] * 4
    assert blobs.fetched == 1 and len(list(folder.iterdir())) == 1


def test_a_version_that_is_forgotten_while_it_comes_is_served_and_leaves_nothing(
    versions: DownloadCache, blobs: Slow, pool: ThreadPoolExecutor, folder: Path
) -> None:
    version, key = put(blobs, 1)
    blobs.slow = key
    coming = pool.submit(versions.open, RUNS["float16"], version, key)
    assert blobs.asked.wait(20)
    versions.forget(RUN)
    blobs.go.set()
    assert content(coming.result(20)) == [1.0]
    assert not list(folder.iterdir()) and versions.known(RUN, 1) is None


def test_versions_that_push_each_other_out_are_all_served(
    versions: DownloadCache, blobs: Slow, pool: ThreadPoolExecutor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_cache, "OWN_BYTES", 40)
    stored = {number: put(blobs, number) for number in range(1, 5)}
    wanted = [1, 2, 3, 4] * 25
    files = [pool.submit(versions.open, RUNS["float16"], *stored[number]) for number in wanted]
    assert [content(each.result(20)) for each in files] == [[float(number)] for number in wanted]
    assert len(list(folder.iterdir())) == 1


def test_a_file_that_cannot_be_removed_hinders_nothing_and_is_tried_again(
    versions: DownloadCache, blobs: Slow, folder: Path
) -> None:
    run, version = RUNS["float16"], put(blobs, 1)
    path = versions.encoded(run, *version).path
    assert path is not None
    path.unlink()
    path.mkdir()
    versions.forget(RUN)
    with pytest.raises(StoreUnavailable, match="cleaning"):
        versions.clean()
    assert content(versions.open(run, *version)) == [1.0], "in another file"
    versions.forget(RUN)
    assert list(folder.iterdir()) == [path]
    path.rmdir()
    versions.clean()
    assert not list(folder.iterdir()) and not versions._unwanted


@pytest.fixture
async def store(tmp_path: Path, blobs: Slow) -> AsyncIterator[Store]:
    (tmp_path / "data").mkdir()
    store = Store(tmp_path / "data", "", "", keep_updates=False, timing=TIMING)
    store.download_cache = DownloadCache(tmp_path / "outbound", blobs)
    yield store
    blobs.go.set()
    await asyncio.to_thread(store.close)


async def test_downloads_that_wait_for_a_bucket_leave_the_threads_of_uploads_alone(store: Store, blobs: Slow) -> None:
    """More of them than there are threads of either kind; half have disconnected."""
    version, key = put(blobs, 1)
    blobs.slow = key
    opening = partial(store.download_cache.open, RUNS["float16"], version, key)

    async def download(offset: int) -> bytes:
        async with store.opened_late(opening) as file:
            return await store.read_file(file, offset, 2)

    downloads = [asyncio.ensure_future(download(2 * at)) for at in range(2 * (FILE_THREADS + VERSION_THREADS))]
    await asyncio.to_thread(blobs.asked.wait, 20)
    for each in downloads[::2]:
        each.cancel()
    await asyncio.wait(downloads[::2])
    async with asyncio.timeout(20):
        assert await store.file(lambda: "a chunk of an upload") == "a chunk of an upload"
        assert await store.compute(lambda: "the check of an upload") == "the check of an upload"
    assert not any(each.done() for each in downloads[1::2])
    blobs.go.set()
    found = await asyncio.gather(*downloads[1::2])
    assert b"".join(found[:8]) == np.ones(8, np.float16).tobytes()


def test_a_late_file_is_open_once_it_was_opened(tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(b"0123")
    file = LateFile(lambda: OpenFile(tmp_path / "payload"))
    assert not file.is_open
    assert file.open() is file.open() and file.is_open
    assert file.read(1, 2) == b"12"
    assert file.leave()
    file.close()
    with pytest.raises(ValueError, match="left"):
        file.open()
