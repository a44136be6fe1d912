"""An error of a failing disk ends the reading with the names of the file and the disk; others keep their fates."""

from __future__ import annotations

import builtins
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft.data.sources import disks
from fedpeft.data.sources.interface import ImageUnreadable, Source
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid
from fedpeft.process.mounts import Mount


def refused(real: Callable[..., Any], part: str, code: int) -> Callable[..., Any]:
    """Returns a function that refuses paths with a part, and is the real one for others."""

    def called(path: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and part in os.fspath(path):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real(path, *arguments, **options)

    return called


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("cat/a.png", "cat/inner/b.png", "dog/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    return tmp_path


def all_read(source: Source) -> int:
    """Returns how many images could not be read."""
    bad = 0
    for row in range(len(source)):
        try:
            source.image_bytes(row)
        except ImageUnreadable:
            bad += 1
    return bad


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
@pytest.mark.parametrize(
    ("place", "name", "part"),
    [(builtins, "open", "a.png"), (builtins, "open", "dog/c"), (os, "scandir", "inner")],
    ids=["image", "head", "listing"],
)
def test_a_failing_disk_is_an_error_that_names_the_file_and_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, place: Any, name: str, part: str
) -> None:
    monkeypatch.setattr(place, name, refused(getattr(place, name), part, code))
    with pytest.raises(DataInvalid) as raised:
        all_read(open_source(folder))
    text = str(raised.value)
    assert f"{folder}/" in text and part in text and os.strerror(code) in text
    assert "disk" in text and "mounted at /" in text and "check it" in text


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.ENOENT])
def test_a_file_that_may_not_be_read_is_one_unreadable_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(builtins, "open", refused(open, "a.png", code))
    assert all_read(open_source(folder)) == 1


def test_an_image_beside_parquet_on_a_failing_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}], kind), "label": [0]})
    pq.write_table(table, tmp_path / "data.parquet")
    source = open_source(tmp_path / "data.parquet")
    assert all_read(source) == 0
    monkeypatch.setattr(Path, "stat", refused(Path.stat, "a.png", errno.ESTALE))
    with pytest.raises(DataInvalid, match=r"a\.png.* mounted at /"):
        all_read(source)


def test_a_failing_disk_is_named_as_far_as_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "mount_of", lambda path: Mount("nas:/x", "/a share", "nfs"))
    assert disks._disk(tmp_path) == "disk nas:/x, mounted at /a share,"
    monkeypatch.setattr(disks, "mount_of", lambda path: None)
    assert disks._disk(tmp_path) == "the disk"
