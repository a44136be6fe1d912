"""Blobs, in a folder, in an S3, and in obstore's store in memory, which takes the same path through the code."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import LocalStore

from fedpeft.errors import BlobCorrupt, DiskFull, StateInvalid, StoreUnavailable
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.blobs.cache import BlobCache

KEY = "runs/run-1/versions/000001.safetensors"
DATA = os.urandom(2 * 1024 * 1024 + 7)


def read(blobs: Blobs, key: str) -> bytes:
    with blobs.local(key) as path:
        return path.read_bytes()


def _place(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if name in ("memory", "s3"):
        url = request.getfixturevalue("s3") + "/a/folder" if name == "s3" else "memory:///"
        return Blobs(url, tmp_path / "cache")
    folder = tmp_path / "blobs with space"
    return Blobs(str(folder) if name == "folder" else folder.as_uri())


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    return _place(request.param, request, tmp_path)


def test_what_was_put_is_got(blobs: Blobs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    pieces = (DATA[i : i + 100_000] for i in range(0, len(DATA), 100_000))
    for data in (DATA, pieces, source, b""):
        blobs.put(KEY, data)
        wanted = b"" if data == b"" else DATA
        assert read(blobs, KEY) == wanted


def test_what_is_missing_is_said(blobs: Blobs) -> None:
    with pytest.raises(BlobCorrupt, match=f"{KEY}.*backup"):
        read(blobs, KEY)


def test_what_is_there_is_known_without_reading_it(blobs: Blobs) -> None:
    assert not blobs.has(KEY) and not blobs.has_any("runs")
    blobs.put(KEY, DATA)
    assert blobs.has(KEY) and not blobs.has(KEY + "x") and not blobs.has("runs/run-1/versions")
    assert blobs.has_any("runs") and not blobs.has_any("other")
    blobs.delete_prefix("runs/run-1/")
    assert not blobs.has(KEY) and not blobs.has_any("runs")


def test_deleting_a_folder_leaves_its_neighbours(blobs: Blobs) -> None:
    for key in (KEY, "runs/run-1/records/000001.json", "runs/run-10/records/000001.json"):
        blobs.put(key, b"x")
        read(blobs, key)
    blobs.delete_prefix("runs/run-1/")
    blobs.delete_prefix("runs/run-2/")
    assert read(blobs, "runs/run-10/records/000001.json") == b"x"
    with pytest.raises(BlobCorrupt):
        read(blobs, KEY)
    blobs.put(KEY, b"again")
    assert read(blobs, KEY) == b"again"


def test_files_beside_one_are_found_without_a_look_at_those_before(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions, listed, seen = "runs/run-1/versions/", obstore.list, list[str]()
    keys = [f"{versions}{number:06}-draw-{draw}.safetensors" for number in range(1, 31) for draw in "ab"]
    for key in keys:
        blobs.put(key, b"x")

    def noted(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in listed(*arguments, **options):
            seen.extend(each["path"] for each in batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "list", noted)
        blobs.keep_only(keys[-1], f"{versions}000030")
    assert sorted(blobs.keys("runs")) == [*keys[:-2], keys[-1]]
    assert sorted(seen) == keys[-2:]


@pytest.fixture
def strict(tmp_path: Path) -> Blobs:
    """Objects in a store that says so when it is to delete one that is not there, as Google's and Azure's do."""
    blobs = Blobs("memory:///", tmp_path / "cache")
    (tmp_path / "objects").mkdir()
    blobs._store = LocalStore(tmp_path / "objects")
    return blobs


class TestDeletingObjectsThatAreGone:
    """Another daemon, or this one before it was killed, may have deleted some."""

    @pytest.fixture(params=["folder", "file", "memory", "s3", "strict"])
    def blobs(self, request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
        name = request.param
        return request.getfixturevalue("strict") if name == "strict" else _place(name, request, tmp_path)

    def test_by_their_keys(self, blobs: Blobs) -> None:
        keys = [f"runs/run-1/versions/{number:06}.safetensors" for number in range(40)]
        for key in keys[::2]:
            blobs.put(key, b"x")
        blobs.delete(keys)
        assert not blobs.has_any("runs")
        blobs.delete(keys)
        blobs.delete([])

    @pytest.mark.parametrize("of_one", [True, False])
    def test_after_they_were_listed(self, strict: Blobs, monkeypatch: pytest.MonkeyPatch, of_one: bool) -> None:
        versions = "runs/run-1/versions/"
        for name in ("000001-aa", "000001-bb", "000001-cc"):
            strict.put(versions + name, b"x")
        listed = obstore.list

        def list_late(*arguments: Any, **options: Any) -> Iterator[Any]:
            batches = list(listed(*arguments, **options))
            obstore.delete(strict._store, f"{versions}000001-bb")
            return iter(batches)

        with monkeypatch.context() as patch:
            patch.setattr(obstore, "list", list_late)
            if of_one:
                strict.keep_only(f"{versions}000001-aa", f"{versions}000001")
            else:
                strict.delete_prefix("runs/run-1/")
        assert list(strict.keys("runs")) == [f"{versions}000001-aa"] * of_one


def test_a_folder_is_deleted_while_other_threads_write(tmp_path: Path) -> None:
    blobs, done = Blobs(str(tmp_path / "blobs")), threading.Event()

    def write(thread: int) -> None:
        for number in range(200):
            blobs.put(f"runs/run-{thread}-{number}/versions/000001", b"x")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as threads:
            writing = [threads.submit(write, thread) for thread in range(2)]
            deleting = threads.submit(lambda: [blobs.delete_prefix("runs/other/") for _ in iter(done.is_set, True)])
            for each in writing:
                each.result()
            done.set()
            assert deleting.result()
    finally:
        done.set()
        sys.setswitchinterval(interval)


def test_the_cache_of_an_object_store_vanishes_with_it() -> None:
    blobs = Blobs("memory:///")
    blobs.put(KEY, DATA)
    with blobs.local(KEY) as path:
        pass
    assert path.read_bytes() == DATA
    with blobs.local(KEY) as again:
        assert again == path
    del blobs
    assert not path.exists()


class TestFaults:
    @pytest.mark.parametrize("url", ["ftp://host/x", "s3:///", "gopher://a"])
    def test_a_url_that_is_none(self, url: str) -> None:
        with pytest.raises(StateInvalid, match="is not a folder"):
            Blobs(url)

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StateInvalid, match=r"opening --blobs .*file/blobs failed: Not a directory"):
            Blobs(str(tmp_path / "file" / "blobs"), flag="--blobs")

    def test_a_key_that_cannot_be_written(self, tmp_path: Path) -> None:
        blobs = Blobs(str(tmp_path))
        blobs.put("runs", b"in the way")
        with pytest.raises(StoreUnavailable, match="writing blob runs/x"):
            blobs.put("runs/x", b"x")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_a_folder_without_permission(self, tmp_path: Path) -> None:
        blobs = Blobs(str(tmp_path / "blobs"))
        (tmp_path / "blobs").chmod(0o500)
        with pytest.raises(StoreUnavailable, match="writing blob"):
            blobs.put(KEY, b"x")

    def test_a_full_disk(self, small_disk: Path) -> None:
        blobs = Blobs(str(small_disk / "blobs"))
        blobs.put("first", DATA[:500_000])
        for data in (DATA, iter([DATA])):
            with pytest.raises(DiskFull, match="no room"):
                blobs.put("second", data)
        with pytest.raises(BlobCorrupt):
            read(blobs, "second")
        assert read(blobs, "first") == DATA[:500_000]


TRACED = """
import sys
from fedpeft_server.store.blobs.blobs import Blobs
blobs = Blobs(sys.argv[1])
blobs.put("runs/run-1/versions/000001", b"x" * 100)
blobs.put("runs/run-1/versions/000002", b"x" * 100)
"""


def test_file_and_folders_are_synced_after_the_rename(tmp_path: Path) -> None:
    """Evidence that only the kernel can give; a power cut cannot be had in a test."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed: apt-get install strace")
    root, log = tmp_path / "blobs", tmp_path / "trace"
    command = [strace, "-f", "-y", "-o", str(log), "-e", "trace=rename,renameat,renameat2,fsync,fdatasync"]
    done = subprocess.run([*command, sys.executable, "-c", TRACED, str(root)], capture_output=True, timeout=60)
    if done.returncode != 0 and b"ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    lines = log.read_text().splitlines()

    def last(call: str, path: Path) -> int:
        return max(
            i for i, line in enumerate(lines) if f"{call}(" in line and (f"<{path}>" in line or f'"{path}"' in line)
        )

    folder = root / "runs" / "run-1" / "versions"
    for name in ("000001", "000002"):
        assert last("rename", folder / name) < last("fsync", folder / name)
    assert last("fsync", folder / "000002") < last("fsync", folder)
    for parent in (root / "runs" / "run-1", root / "runs", root):
        assert last("fsync", parent) > last("rename", folder / "000001")


CRASHING = """
import sys
from fedpeft_server.store.blobs.blobs import Blobs
blobs = Blobs(sys.argv[1])
for number in range(10_000):
    blobs.put(f"runs/run-1/versions/{number}", (bytes([number % 256]) * 100_000 for _ in range(5)))
    print(number, flush=True)
"""


def test_killed_between_any_two_instructions_no_blob_is_torn(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", CRASHING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    finished = [int(process.stdout.readline()) for _ in range(5)]
    process.send_signal(signal.SIGKILL)
    finished += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.stdout.close()
    assert process.wait(10) == -signal.SIGKILL
    blobs = Blobs(str(tmp_path))
    for number in range(len(finished) + 1):
        key = f"runs/run-1/versions/{number}"
        if number in finished or (tmp_path / key).exists():
            assert read(blobs, key) == bytes([number % 256]) * 500_000
    blobs.delete_prefix("runs/run-1/")
    assert not (tmp_path / "runs" / "run-1").exists()


class TestCache:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "cache"

    def read(self, cache: BlobCache, key: str, size: int = 100) -> Path:
        return cache.path(key, lambda: [key[-1:].encode() * size])

    def test_what_was_read_longest_ago_goes_first(self, folder: Path) -> None:
        cache = BlobCache(folder, most_bytes=250)
        a, b = self.read(cache, "runs/a"), self.read(cache, "runs/b")
        assert self.read(cache, "runs/a") == a
        c = self.read(cache, "runs/c")
        assert (a.exists(), b.exists(), c.exists()) == (True, False, True)
        assert self.read(cache, "runs/b").read_bytes() == b"b" * 100, "it is read again"
        assert not a.exists()

    def test_what_is_in_use_stays_and_what_is_larger_than_all_is_served(self, folder: Path) -> None:
        cache = BlobCache(folder, most_bytes=150)
        with cache.held("runs/a", lambda: [b"a" * 100]) as a:
            large = self.read(cache, "runs/b", 1000)
            assert a.exists() and large.stat().st_size == 1000
        self.read(cache, "runs/c")
        assert not a.exists() and not large.exists()

    def test_what_a_killed_process_left_is_removed(self, folder: Path) -> None:
        self.read(BlobCache(folder), "runs/a")
        (folder / "half").write_bytes(b"x")
        BlobCache(folder)
        assert not folder.exists()

    def test_a_reading_that_fails_leaves_nothing(self, folder: Path) -> None:
        def broken() -> Iterator[bytes]:
            yield b"x"
            raise StateInvalid("the connection broke")

        with pytest.raises(StateInvalid, match="the connection broke"):
            BlobCache(folder).path("runs/a", broken)
        assert not any(path.is_file() for path in folder.rglob("*"))
