"""Locks on files (flock): one process at a time uses a folder.

The system lets go of a lock with its process, so what a killed one left locks nobody out. A file that is locked has the
process id of its holder, for the message to the second one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedpeft.errors import StateInvalid
from fedpeft.process import durable

LOCK = "lock"
"""The file that a server holds in its data directory, and a client in its state directory."""
GLANCE_S = 0.2
"""For so long a lock that another process has is tried again: `holder_of` has it for an instant."""


def attempt(descriptor: int, *, shared: bool = False) -> bool | None:
    """Tries to lock an open file.

    Args:
        descriptor: The file, which is locked until all descriptors of this opening are closed.
        shared: Lets other shared locks stand, as for a look.

    Returns:
        True if it is locked now, False if another process has it, None if its file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def directory(folder: Path, named: str, holder: str, cure: str) -> Iterator[None]:
    """Holds a data or state directory, which exists, as long as the block lasts.

    Args:
        folder: The directory.
        named: The words for it in a message, as `--data-dir /srv/fedpeft`.
        holder: The kind of process that holds it, as `server`.
        cure: Words for what the second process may do in place of waiting, as `name another folder`.

    Raises:
        StateInvalid: If another process, or another thread of this one, holds it, or it cannot be written.
    """
    with _held(folder / LOCK, named, holder, cure):
        yield


@contextmanager
def results(folder: Path, holder: str) -> Iterator[None]:
    """Holds a folder of results likewise: two commands that write there would destroy each other's files.

    It is held by its files, whatever path or link names it; nothing of the lock is left in it.

    Raises:
        StateInvalid: If another process, or another thread of this one, holds it, or it cannot be written.
    """
    with _held_and_removed(folder / ".lock", str(folder), holder, "name another folder"):
        yield


@contextmanager
def file(path: Path, named: str, holder: str, cure: str) -> Iterator[None]:
    """Holds a file, which need not exist yet, as `directory` holds a folder, by another one beside it: PATH.lock.

    The file itself is left to the locks of those who work on it, as SQLite's. It is held by whatever path or symbolic
    link names it; nothing of the lock is left.

    Raises:
        StateInvalid: If another process, or another thread of this one, holds it, or its folder cannot be written.
    """
    real = Path(os.path.realpath(path))
    with _held_and_removed(real.with_name(f"{real.name}.lock"), named, holder, cure):
        yield


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block of this folder; nothing of the lock is left in it.

    For what takes moments and harms nothing where a file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def holder_of(folder: Path) -> str | None:
    """Returns the process that holds a directory, None if none does, `unknown` if it did not write its id yet."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _process(descriptor) if attempt(descriptor, shared=True) is False else None
    finally:
        os.close(descriptor)


@contextmanager
def _held_and_removed(path: Path, named: str, holder: str, cure: str) -> Iterator[None]:
    with _held(path, named, holder, cure):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it has no name any more


@contextmanager
def _held(path: Path, named: str, holder: str, cure: str) -> Iterator[None]:
    with durable.refusals(f"locking {path}"):
        descriptor = _taken(path, named, holder, cure)
    try:
        with suppress(OSError):  # a full disk: the id is for a message only
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _taken(path: Path, named: str, holder: str, cure: str) -> int:
    """Returns the descriptor of the file, locked."""
    deadline = time.monotonic() + GLANCE_S
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        locked = attempt(descriptor)
        if locked is None:
            import structlog  # only here: commands that ask a server something are quicker without

            log = structlog.get_logger(__name__)
            log.warning("this file system has no locks: let nothing else write there", path=str(path))
        if locked is not False and os.fstat(descriptor).st_nlink:
            return descriptor
        process = _process(descriptor)
        os.close(descriptor)
        if locked is False:  # else its holder removed it in the instant before it was locked
            if time.monotonic() > deadline:
                raise StateInvalid(
                    f"{named} is in use by another {holder} (process {process}); stop it first, or {cure}"
                )
            time.sleep(GLANCE_S / 10)


def _process(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
