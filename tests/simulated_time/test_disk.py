"""The bytes of a file that a disk has after syncs of which one failed."""

from __future__ import annotations

from .disk import PAGE_BYTES, written


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
