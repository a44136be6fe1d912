"""A disk after a power failure, and the bytes of a file after syncs of which one failed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from .disk import PAGE_BYTES, Disk, written


@pytest.mark.parametrize("to", ["settled", "aside/settled"])
def test_a_renamed_folder_has_its_old_name_or_the_new_one_after_a_power_failure(tmp_path: Path, to: str) -> None:
    left = set()
    for seed in range(20):
        place = tmp_path / str(seed)
        (place / "pending").mkdir(parents=True)
        (place / "aside").mkdir()
        (place / "pending" / "payload").write_bytes(b"bytes")
        disk = Disk(place)
        (place / "pending").rename(place / to)
        after = disk.after_a_power_failure(tmp_path / f"{seed}-after", random.Random(seed))
        found = [file for file in after.path.rglob("payload") if file.read_bytes() == b"bytes"]
        assert len(found) == 1
        left.add(str(found[0].parent.relative_to(after.path)))
    assert left == {"pending", to}


def test_a_folder_that_was_renamed_and_forced_to_disk_has_its_new_name(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    (place / "pending").mkdir(parents=True)
    disk = Disk(place)
    (place / "pending").rename(place / "settled")
    descriptor = os.open(place, os.O_RDONLY)
    disk.forced(descriptor)
    os.close(descriptor)
    for seed in range(5):
        after = disk.after_a_power_failure(tmp_path / str(seed), random.Random(seed))
        assert [entry.name for entry in after.path.iterdir()] == ["settled"]


def test_a_line_that_is_added_after_a_failed_sync_is_written_with_its_page():
    before = b"one\n"
    assert written(before, before + b"two\n", before + b"two\nthree\n") == b"one\ntwo\nthree\n"


def test_a_sync_that_is_only_repeated_writes_nothing():
    assert written(b"one\n", b"one\ntwo\n", b"one\ntwo\n") == b"one\n\0\0\0\0"
    assert written(b"", b"one\n", b"one\n") == b"\0\0\0\0"


def test_whole_pages_of_the_failed_sync_stay_as_they_were():
    before = b"a" * (PAGE_BYTES + 10)
    failed = before + b"b" * (2 * PAGE_BYTES)
    data = failed + b"c" * 5
    found = written(before, failed, data)
    assert found[:PAGE_BYTES] == before[:PAGE_BYTES]
    assert found[PAGE_BYTES : 3 * PAGE_BYTES] == b"a" * 10 + b"\0" * (2 * PAGE_BYTES - 10)
    assert found[3 * PAGE_BYTES :] == data[3 * PAGE_BYTES :]


def test_without_a_failure_all_is_written():
    assert written(b"one\n", b"", b"two\n") == b"two\n"
