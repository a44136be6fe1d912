"""Files that are replaced whole, by several at once too."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedpeft import durable


def test_several_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, contents = tmp_path / "certificate.pem", [bytes([k]) * 100_000 for k in range(8)]

    def write(content: bytes) -> None:
        for _ in range(10):
            durable.write(path, content)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["certificate.pem"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    (path / "by a folder").mkdir(parents=True)
    with pytest.raises(OSError, match="irectory"):
        durable.write(path, b"data")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_file_is_its_owners_only(tmp_path: Path) -> None:
    durable.write(tmp_path / "key.pem", b"secret")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
