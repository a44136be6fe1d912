"""A lock on a folder of results: two commands that write the same `--out` would destroy each other's files.

The lock (flock) is on the file `.lock` in the folder, which has the holder's process id and is removed in the end. The
system lets go of the lock with the process, so what a killed one left locks nobody out.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from fedpeft.errors import StateInvalid

LOCK = ".lock"

log = structlog.get_logger(__name__)


@contextmanager
def held(folder: Path, holder: str) -> Iterator[None]:
    """Holds a folder as long as the block lasts.

    Args:
        folder: The folder, which exists. It is held by its files, whatever path or link names it.
        holder: The kind of process that holds it, as `simulation`: for the message to the second one.

    Raises:
        StateInvalid: If another process, or another thread of this one, holds it.
        OSError: If the lock file cannot be made.
    """
    path = folder / LOCK
    descriptor = _taken(path, holder)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it has no name any more
        os.close(descriptor)


def _taken(path: Path, holder: str) -> int:
    """Returns the descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise StateInvalid(
                f"{path.parent} is in use by another {holder} (process {other or 'unknown'}); stop it first, or name "
                "another folder"
            ) from None
        except OSError as error:
            log.warning("this file system has no locks: let nothing else write there", path=str(path), cause=str(error))
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its holder removed it in the instant before it was locked


def is_held(path: Path) -> bool:
    """Says whether a process holds the lock file `path`, this module's or a server's; false if it is not there."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: nothing is held
        return False
    finally:
        os.close(descriptor)
    return False
