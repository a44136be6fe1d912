"""Unpacked images lie in a file without a name, and what is unpacked at a time is bounded in bytes."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft.data.sources import parquet, parquet_files
from fedpeft.data.sources.opening import open_source
from fedpeft.data.spool import Spool
from fedpeft.data.store import PixelStore
from fedpeft.data.transforms import Preprocessing
from fedpeft.errors import DataInvalid, DiskFull

from .test_sources import IMAGE, png, table, write

OPENS = """
import sys
from fedpeft.data.sources import parquet
from fedpeft.data.sources.opening import open_source
parquet.IN_MEMORY_BYTES = 0
source = open_source(sys.argv[1])
print(bytes(source.image_bytes(3)).hex(), flush=True)
sys.stdin.read()
"""


def test_a_killed_process_leaves_no_images_behind(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", OPENS, str(write(tmp_path / "data.parquet", table(20)))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == png(3).hex()
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert f"{tmp_path / 'tmp'}/" in maps and "(deleted)" in maps  # it lies there, and has no name
        assert os.listdir(tmp_path / "tmp") == []
        process.kill()
    assert os.listdir(tmp_path / "tmp") == []


def test_processes_that_decode_read_the_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    source = open_source(write(tmp_path / "data.parquet", table(20)))
    store = PixelStore(source, Preprocessing(4, (0.5,) * 3, (0.5,) * 3), cache_bytes=0, workers=1)
    (pixels, good) = next(store.batches([np.arange(20)]))
    assert good.all()
    assert pixels[:, 0, 0, 0].tolist() == list(range(20))
    assert store._decoders is not None
    store._decoders.end()


def test_a_process_whose_maker_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(iter([]), pa.schema([]))
    monkeypatch.setattr(spool, "_path", Path("/proc/1/fd/999999"))
    with pytest.raises(DataInvalid, match="the process that unpacked the data is gone"):
        spool.batches()


@pytest.mark.parametrize("path", ["/proc/1/fd/999999", "/dev/null"])
def test_on_another_machine_a_source_unpacks_its_files_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    source = open_source(write(tmp_path / "data.parquet", table(20)))
    monkeypatch.setattr(source._spool, "_path", Path(path))  # as there: no such process, or one of the same id
    other = pickle.loads(pickle.dumps(source))
    assert [bytes(other.image_bytes(row)) for row in range(20)] == [bytes(source.image_bytes(row)) for row in range(20)]
    assert other._spool.is_here and not source._spool.is_here


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_temporary_folder_that_refuses_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        if code == errno.ENOSPC:
            return open("/dev/full", "r+b", buffering=0)
        raise OSError(code, os.strerror(code))

    path = write(tmp_path / "data.parquet", table(20))
    monkeypatch.setattr(parquet, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    error = DataInvalid if code == errno.EACCES else DiskFull
    with pytest.raises(error, match=rf"temporary folder {tempfile.gettempdir()}.*variable TMPDIR"):
        open_source(path)


@pytest.mark.parametrize("group", [1, 7, 100, 1000])
@pytest.mark.parametrize("limit", [1, 5000, 10**9])
def test_rows_come_in_order_in_batches_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int, limit: int
) -> None:
    monkeypatch.setattr(parquet_files, "BATCH_BYTES", limit)
    generator = np.random.default_rng(0)
    sizes = [1000 if 40 <= k < 50 else 10 for k in range(200)]  # large ones beside each other
    images = pa.array([{"bytes": generator.bytes(n), "path": str(k)} for k, n in enumerate(sizes)], IMAGE)
    built = table(200).set_column(0, "image", images)
    files = parquet_files.ParquetFiles([write(tmp_path / "data.parquet", built, group)])
    batches = list(files.batches())
    assert pa.Table.from_batches(batches).equals(built)
    if limit == 5000:
        assert max(batch.nbytes for batch in batches) <= 15_000  # of 18,000 or more that all rows have
    if limit == 10**9:
        assert len(batches) == 1


def test_a_batch_that_arrow_cannot_put_together_is_read_in_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "data.parquet", table(3000), 3000)
    asked: list[int] = []
    whole = pq.ParquetFile.iter_batches

    def limited(self: pq.ParquetFile, batch_size: int, groups: list[int]) -> Any:
        asked.append(batch_size)
        for number, batch in enumerate(whole(self, batch_size, groups)):
            if batch_size > 200 and number == 1:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", limited)
    source = open_source(file)
    assert (len(source), asked) == (3000, [1024, 128])
    for row in (0, 1023, 1024, 1025, 2999):
        assert bytes(source.image_bytes(row)) == png(row % 256)
