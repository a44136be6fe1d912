"""Files held against their digests when they are read: folders, buckets and their copies, versions for clients."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters.adapter_file import AdapterInfo, write_adapter
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.errors import BlobCorrupt
from fedpeft_server.store.blobs import integrity
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.blobs.download_cache import DownloadCache
from fedpeft_server.store.blobs.integrity import Corruption, Integrity, Kind
from fedpeft_server.store.rows import VersionRow
from fedpeft_server.store.store import version_key
from fedpeft_server.timing import TIMING

from ..rows import CONFIG, RUN, run_row

KEY = "runs/run-1/versions/000001.safetensors"
DATA = os.urandom(100_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
SPEC = AdapterSpec.of("bias", [TensorSpec("head.weight", (4, 4))])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = pytest.mark.parametrize("damage", [flip, truncate, remove])
Damage = Callable[[Path], None]


@pytest.fixture
def found() -> list[Corruption]:
    return []


@pytest.fixture
def files(found: list[Corruption]) -> Integrity:
    return Integrity(found.append, TIMING.file_trusted_s)


class TestTrust:
    def test_a_file_is_read_once_as_long_as_it_looks_the_same(
        self, files: Integrity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(DATA)
        assert files.fault(path, SHA256) == ""
        with monkeypatch.context() as patch:
            patch.setattr(integrity, "_read", None)
            assert files.fault(path, SHA256) == ""
        assert files.fault(path, "0" * 64) == f"has sha256 {SHA256}"
        looks = path.stat()
        flip(path)
        os.utime(path, ns=(looks.st_atime_ns, looks.st_mtime_ns))
        assert files.fault(path, SHA256) == ""
        files.distrust(path)
        assert files.fault(path, SHA256).startswith("has sha256 ")

    def test_trust_ends_after_a_while(self, files: Integrity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "file"
        path.write_bytes(DATA)
        files.note(path, SHA256)
        looks = path.stat()
        flip(path)
        os.utime(path, ns=(looks.st_atime_ns, looks.st_mtime_ns))
        assert files.fault(path, SHA256) == ""
        later = time.monotonic() + TIMING.file_trusted_s
        monkeypatch.setattr(integrity.time, "monotonic", lambda: later)
        assert files.fault(path, SHA256).startswith("has sha256 ")

    def test_what_was_noted_is_forgotten_where_there_is_much(
        self, files: Integrity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(integrity, "REMEMBERED", 3)
        for number in range(9):
            (tmp_path / str(number)).write_bytes(DATA)
            files.note(tmp_path / str(number), SHA256)
        assert [path.name for path in files._verified] == ["6", "7", "8"]

    def test_a_sector_that_cannot_be_read_is_a_fault_and_a_full_table_of_files_is_none(
        self, files: Integrity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(number: int) -> Callable[..., None]:
            def read(*_: object, **__: object) -> None:
                raise OSError(number, os.strerror(number))

            return read

        monkeypatch.setattr(integrity, "_read", failing(errno.EIO))
        assert files.fault(tmp_path, SHA256) == "cannot be read: Input/output error"
        monkeypatch.setattr(integrity, "_read", failing(errno.EMFILE))
        with pytest.raises(OSError, match="Too many open files"):
            files.fault(tmp_path, SHA256)

    def test_nothing_that_was_set_aside_is_overwritten(self, tmp_path: Path) -> None:
        for content in ("first", "second"):
            (tmp_path / "file").write_text(content)
            assert integrity.set_aside(tmp_path / "file")
        assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
            "file.1.corrupt": "first",
            "file.2.corrupt": "second",
        }
        assert integrity.set_aside(tmp_path / "file") == ""


class TestBlobs:
    @DAMAGES
    def test_a_corrupt_blob_of_a_folder_is_set_aside(
        self, tmp_path: Path, damage: Damage, files: Integrity, found: list[Corruption]
    ) -> None:
        blobs = Blobs(str(tmp_path / "blobs"), files=files)
        blobs.put(KEY, DATA)
        with blobs.verified(KEY, SHA256, Kind.VERSION) as path:
            assert path.read_bytes() == DATA
        damage(path)
        with pytest.raises(BlobCorrupt, match=f"{KEY}.*from a backup"), blobs.verified(KEY, SHA256, Kind.VERSION):
            pass
        (one,) = found
        assert (one.kind, one.key, one.sha256) == (Kind.VERSION, KEY, SHA256)
        assert not blobs.has(KEY)
        assert bool(one.aside) is (damage is not remove)
        assert not one.aside or blobs.has(one.aside)

    @DAMAGES
    def test_a_corrupt_copy_of_an_object_is_fetched_again(
        self, tmp_path: Path, damage: Damage, files: Integrity, found: list[Corruption]
    ) -> None:
        blobs = Blobs("memory:///", tmp_path / "cache", files=files)
        blobs.put(KEY, DATA)
        for _ in range(2):
            with blobs.verified(KEY, SHA256, Kind.VERSION) as path:
                assert path.read_bytes() == DATA
            damage(path)
        with blobs.verified(KEY, SHA256, Kind.VERSION) as path:
            assert path.read_bytes() == DATA
        assert [one.kind for one in found] == ([Kind.COPY] * 2 if damage is not remove else [])

    @pytest.mark.parametrize("data", [DATA[:-1], b"x" + DATA[1:], b""])
    def test_a_corrupt_object_is_set_aside_in_its_bucket(
        self, tmp_path: Path, data: bytes, files: Integrity, found: list[Corruption]
    ) -> None:
        blobs = Blobs("memory:///", tmp_path / "cache", files=files)
        blobs.put(KEY, data)
        with pytest.raises(BlobCorrupt, match=KEY), blobs.verified(KEY, SHA256, Kind.VERSION):
            pass
        assert [one.kind for one in found] == [Kind.COPY, Kind.VERSION]
        with blobs.local(found[-1].aside) as aside:
            assert aside.read_bytes() == data
        blobs.put(KEY, DATA)
        with blobs.verified(KEY, SHA256, Kind.VERSION) as path:
            assert path.read_bytes() == DATA


@DAMAGES
@pytest.mark.parametrize("down", ["float16", "float32"])
def test_a_version_for_clients_that_rots_is_made_again(
    tmp_path: Path, damage: Damage, down: str, files: Integrity, found: list[Corruption]
) -> None:
    blobs = Blobs("memory:///", tmp_path / "cache", files=files)
    versions = DownloadCache(tmp_path / "outbound", blobs, files)
    codec = CONFIG.codec.model_copy(update={"down": down})
    run, file = run_row(spec=SPEC, config=CONFIG.model_copy(update={"codec": codec})), io.BytesIO()
    info = AdapterInfo(RUN, 1, "bias", "f" * 64, "vit_tiny", ("a", "b"))
    written = write_adapter(file, info, SPEC.shared, {"head.weight": np.full((4, 4), 0.5, np.float32)})
    row, key = VersionRow(RUN, 1, written.sha256, written.size_bytes, "", 1.0), version_key(RUN, 1)
    blobs.put(key, file.getvalue())
    kept = tmp_path / "outbound" if down == "float16" else tmp_path / "cache"
    for times in range(3):
        sent = versions.open(run, row, key)
        manifest = versions.encoded(run, row, key).manifest
        data = sent.read(0, manifest.payload_bytes)
        sent.close()
        assert hashlib.sha256(data).digest() == manifest.sha256
        expected = {"float16": Kind.DOWNLOAD, "float32": Kind.COPY}[down]
        assert [one.kind for one in found] == ([expected] * times if (down, damage) != ("float32", remove) else [])
        (path,) = (p for p in kept.rglob("*") if p.is_file() and p.suffix != f".{integrity.SUFFIX}")
        damage(path)


def test_files_that_are_not_trusted_any_more_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of them are gone by then: a server that works for months would keep every update that it ever folded."""
    now = 1000.0
    monkeypatch.setattr(integrity.time, "monotonic", lambda: now)
    files = Integrity(trusted_s=TIMING.file_trusted_s)
    for number in range(20):
        path = tmp_path / f"{number}.update"
        path.write_bytes(b"x")
        files.note(path, "ab" * 32)
        path.unlink()
        now += TIMING.file_trusted_s / 4
    assert len(files._verified) == 5
