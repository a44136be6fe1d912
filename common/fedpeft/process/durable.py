"""Files that outlive the process and the machine, and what the file system refuses in one sentence.

A file that is written aside, forced to disk and renamed is whole or absent after a crash at any instant. The name aside
is `NAME.<16 hexadecimal digits>.new`, for a folder with a dot before it. It is removed when the writing fails or is
interrupted. What a killed process left is removed by the next writer of the same name, or by `sweep`: whoever writes
holds a lock (flock) on what lies aside, so what is not locked belongs to nobody.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fedpeft.errors import DiskFull, FedpeftError, StateInvalid


def sync(path: Path) -> None:
    """Makes the bytes of a file durable, or the names in a folder: a rename outlives the machine only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Makes a folder, and those above it, where they are not there; their names outlive the machine.

    The name of one that is there is made durable too: who made it may have been killed before that.
    """
    missing = [place for place in (path, *path.parents) if not place.is_dir()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for place in missing or [path]:
        sync(place.parent)


_ASIDE = re.compile(r"\.?(?P<name>.+)\.[0-9a-f]{16}\.new", re.DOTALL)
_NAME_BYTES = 200
"""Of a name, in its name aside: file systems take 255 bytes."""

FOR_ALL = 0o666
"""Mode of a file that other people of the machine may read, as far as the umask lets them."""


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file; after a crash it has the old content or the new, and that of one of those who wrote at once."""
    with writing(path, mode) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8) that is for people to read."""
    write(path, text.encode(), FOR_ALL)


def append(path: Path, data: bytes) -> None:
    """Appends to a file: all of the data, or nothing where there is no room.

    A process that is killed meanwhile may leave a part of it. Nothing is synced.

    Raises:
        OSError: If the file system refuses it; the file is as it was then.
    """
    with path.open("ab", buffering=0) as file:
        before, left = os.fstat(file.fileno()).st_size, memoryview(data)
        try:
            while left:  # a full disk takes what it has room for, and refuses the rest
                left = left[file.write(left) :]
        except OSError:
            file.truncate(before)
            raise


@contextmanager
def writing(path: Path, mode: int = FOR_ALL) -> Iterator[io.BufferedRandom]:
    """Opens a file, for writing and reading, that replaces `path` when the block ends and vanishes when it raises.

    A symbolic link stays, and what it points to is replaced. What is no file, such as /dev/stdout or a pipe, is written
    as it is.
    """
    if _is_special(path):
        with path.open("wb") as device:
            yield cast(io.BufferedRandom, device)  # it cannot be read
        return
    target = Path(os.path.realpath(path))
    aside, descriptor = _create(target, mode)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            move(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Yields a new folder that becomes `path` when the block ends, and vanishes with all in it when it raises.

    `path` must not be there by then, or be an empty folder.
    """
    with scratch(path) as private:
        made = private / "whole"
        made.mkdir()  # with the rights that the umask leaves; what lies around it is its maker's alone
        yield made
        settle(made, path)


def settle(made: Path, path: Path) -> None:
    """Makes a finished file, or a folder with all in it, durable and renames it to `path`; a link there stays."""
    if made.is_dir():
        for place, _, names in os.walk(made):
            for name in names:
                sync(Path(place, name))
            sync(Path(place))
    else:
        sync(made)
    move(made, Path(os.path.realpath(path)))


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yields a new folder beside `path`, on the same file system, and removes it in the end."""
    path = Path(os.path.realpath(path))
    sweep(path.parent)  # also what was to have another name: copies of images may lie in it
    made = path.with_name(f".{_aside(path.name)}")
    made.mkdir(mode=0o700)
    try:
        descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            _lock(descriptor)
            yield made
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def sweep(place: Path, name: str | None = None) -> None:
    """Removes what killed processes left aside in a folder.

    Args:
        place: The folder; one that is not there, or cannot be read, has nothing to remove.
        name: Only what was to become this; everything if None.
    """
    wanted = None if name is None else _short(name)
    # Neither does a file that cannot be removed keep anybody from writing: it is tried again the next time.
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            found = _ASIDE.fullmatch(entry.name)
            if found and wanted in (None, found["name"], f".{found['name']}"):
                _remove_unheld(Path(entry.path))


def _aside(name: str) -> str:
    return f"{_short(name)}.{secrets.token_hex(8)}.new"


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


def _create(path: Path, mode: int) -> tuple[Path, int]:
    """Opens a new, locked file beside `path`."""
    sweep(path.parent, path.name)
    while True:
        aside = path.with_name(_aside(path.name))
        descriptor = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        _lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return aside, descriptor
        os.close(descriptor)  # somebody swept it in the instant before it was locked


def _lock(descriptor: int) -> None:
    # A file system without locks keeps what killed processes leave: nobody can tell that it is nobody's.
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _remove_unheld(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return  # its writer is at work, or this file system has no locks
    finally:
        os.close(descriptor)


def _is_special(path: Path) -> bool:
    try:
        kind = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


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
"""Bytes written before the disk is told to start on them; measured, a sync of 86 MB waits 19 ms instead of 51."""


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
def naming_files() -> Iterator[None]:
    """Turns a refusal of the file system that nobody else has met into a sentence with the file's name.

    For a whole command: a folder that may not be entered, or a name that is too long, fails in any look at the path.

    Raises:
        StateInvalid: If a file or folder is refused; an error about none of them stays as it is.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, str | bytes | os.PathLike):
            raise
        place = os.fsdecode(error.filename)
        raise StateInvalid(f"cannot use {place}: {error.strerror}; check the path and the permissions") from error


@contextmanager
def refusals(what: str, refused: type[FedpeftError] = StateInvalid) -> Iterator[None]:
    """Turns what the file system refuses into this project's errors.

    Args:
        what: Name of the work under way, for example `writing blob KEY`.
        refused: Class of the error for every refusal but a full disk.

    Raises:
        DiskFull: If there is no room.
        FedpeftError: For every other refusal, of the class `refused`.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (DiskFull if is_full else refused)(f"{what} failed: {in_words(error)}") from error


def in_words(error: OSError) -> str:
    """Returns what the file system refused, and what to do."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "there is no room left on its disk; free some space"
        case errno.EROFS:
            return f"{error.strerror}; see the kernel's log, and mount it for writing"
    return f"{error.strerror or error}; check its folder and the permissions"
