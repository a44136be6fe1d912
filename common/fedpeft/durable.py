"""Files that outlive the process and the machine, and what the file system refuses in one sentence.

A file that is written aside, forced to disk and renamed is whole or absent after a crash at any instant.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedpeft.errors import DiskFull, StateInvalid


def sync(path: Path) -> None:
    """Makes the bytes of a file durable, or the names in a folder: a rename outlives the machine only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file; after a crash it has the old content or the new, and that of one of those who wrote at once."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        move(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def move(source: Path, target: Path) -> None:
    """Renames, and makes the names in both folders durable."""
    source.rename(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)


def sha256(path: Path) -> bytes:
    """Returns the digest of a file, 32 bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# Python has no name for it; absent where the system is not Linux.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: start, and do not wait."""


def start_writeback(descriptor: int, offset: int, length: int) -> None:
    """Starts writing a range of a file to the disk, so that a later sync finds little left to do.

    Promises nothing, so its failure is no error: the sync reports what matters.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, offset, length, _WRITE)


WRITEBACK_BYTES = 4 * 1024 * 1024
"""How much is written before the disk is told to start on it; measured, a sync of 86 MB waits 19 ms instead of 51."""


class _Eager(io.FileIO):
    """A file whose bytes the disk takes up while the rest is still being made."""

    _started = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        position = self.tell()
        if position - self._started >= WRITEBACK_BYTES:
            start_writeback(self.fileno(), self._started, position - self._started)
            self._started = position
        return written


def create_eagerly(path: Path) -> BinaryIO:
    """Opens a new file for writing that will be synced soon after."""
    return cast(BinaryIO, io.BufferedWriter(_Eager(path, "w")))


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turns what the file system refuses into this project's errors.

    Args:
        what: What is being done, for example `writing blob KEY`.

    Raises:
        DiskFull: If there is no room.
        StateInvalid: For every other refusal.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{what} failed: there is no room left on its disk; free some space") from error
        words = error.strerror or str(error)
        raise StateInvalid(f"{what} failed: {words}; check its folder and the permissions") from error
