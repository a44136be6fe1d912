"""Integrity of stored files: each is held against its digest when it is read, and one that has another is reported.

Reading a file twice costs as much as the fold of it, so a file that was verified in this process is trusted for
some minutes as long as it looks the same (size, time of modification, inode). A disk that gives other bytes without any
of these changing is found out by the next look after that; clients check what they pull, so nobody trains on it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog

log = structlog.get_logger()

REMEMBERED = 16_384
"""Most files that are known to be verified; others are read again."""
SUFFIX = "corrupt"
"""Last part of the name of a file that was set aside."""
MISSING = "is missing"
"""Fault of a file that is not there."""

_Looks = tuple[int, int, int]
"""Size, time of modification in nanoseconds, and inode."""


class Kind(StrEnum):
    """Kind of a stored file."""

    VERSION = "version"
    """An adapter version."""
    STATE = "state"
    """The state of a strategy that belongs to one."""
    SUM = "sum"
    """The sum of a round, for a parent's server."""
    UPDATE = "update"
    """A received update."""
    DOWNLOAD = "download"
    """A version as it is encoded for clients."""
    COPY = "copy"
    """A copy of an object in a bucket."""


@dataclass(frozen=True, slots=True)
class Corruption:
    """A file that is not what was stored.

    Attributes:
        kind: Its kind.
        key: Its key or name.
        sha256: The digest that it should have, hexadecimal.
        found: Fault of it, such as `has sha256 ...`.
        aside: Name under which it is kept; empty if it is not.
    """

    kind: Kind
    key: str
    sha256: str
    found: str
    aside: str = ""

    @property
    def words(self) -> str:
        """The finding as a part of a sentence."""
        aside = f"; it is kept as {self.aside}" if self.aside else ""
        return f"{self.key} {self.found}; sha256 {self.sha256} is recorded{aside}"


class Integrity:
    """The verified files of one process, and the reports of those that failed; may be used from any thread.

    Args:
        tell: Called with each finding, beside the log.
        trusted_s: Seconds for which a file that was verified, and looks the same, need not be read again.
    """

    def __init__(self, tell: Callable[[Corruption], object] = lambda found: None, trusted_s: float = 0.0) -> None:
        self._tell = tell
        self._trusted_s = trusted_s
        self._lock = threading.Lock()
        self._verified: OrderedDict[Path, tuple[_Looks, str, float]] = OrderedDict()

    def fault(self, path: Path, sha256: str) -> str:
        """Returns what is the matter with a file that should have a digest; empty if nothing is.

        A file that seems wrong is read once more, from the disk rather than the system's memory of it.

        Raises:
            OSError: If it may be well, but cannot be opened or read for now.
        """
        try:
            if self._is_trusted(path, sha256):
                return ""
            for refreshed in (False, True):
                looks, found = _read(path, refreshed=refreshed)
                if found == sha256:
                    self._remember(path, looks, sha256)
                    return ""
        except FileNotFoundError:
            return MISSING
        except OSError as error:
            if not _is_of_medium(error):
                raise
            return f"cannot be read: {error.strerror}"
        return f"has sha256 {found}"

    def note(self, path: Path, sha256: str) -> None:
        """Notes that a file was verified just now, or written with that digest."""
        self._remember(path, _looks(path.stat()), sha256)

    def distrust(self, path: Path) -> None:
        """Has a file verified when it is next read, however it looks."""
        with self._lock:
            self._verified.pop(path, None)

    def report(self, found: Corruption) -> None:
        """Logs and counts a finding."""
        log.error(
            "a stored file is corrupt",
            kind=str(found.kind),
            key=found.key,
            sha256=found.sha256,
            found=found.found,
            aside=found.aside or "nowhere",
        )
        self._tell(found)

    def _is_trusted(self, path: Path, sha256: str) -> bool:
        known = self._verified.get(path)
        if known is None or known[1] != sha256 or time.monotonic() - known[2] > self._trusted_s:
            return False
        return known[0] == _looks(path.stat())

    def _remember(self, path: Path, looks: _Looks, sha256: str) -> None:
        """Notes a file; those that are not trusted any more are forgotten, for most of them are gone by then."""
        now = time.monotonic()
        with self._lock:
            self._verified[path] = looks, sha256, now
            self._verified.move_to_end(path)
            while len(self._verified) > REMEMBERED or now - next(iter(self._verified.values()))[2] > self._trusted_s:
                self._verified.popitem(last=False)


def set_aside(path: Path) -> str:
    """Renames a file to a free name beside it; returns that, or "" if there is no such file.

    Raises:
        OSError: If the folder refuses.
    """
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.{number}.{SUFFIX}")
        if not aside.exists():
            break
    try:
        path.rename(aside)
    except FileNotFoundError:
        return ""
    return str(aside)


def _looks(status: os.stat_result) -> _Looks:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _read(path: Path, *, refreshed: bool) -> tuple[_Looks, str]:
    """Returns the looks of a file and its digest, read from the disk if it is to be `refreshed`."""
    with path.open("rb", buffering=0) as file:
        looks = _looks(os.fstat(file.fileno()))
        if refreshed:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return looks, hashlib.file_digest(file, "sha256").hexdigest()


def _is_of_medium(error: OSError) -> bool:
    """Returns True if an error says that the bytes are lost, and not that they cannot be had for now."""
    return error.errno in (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
