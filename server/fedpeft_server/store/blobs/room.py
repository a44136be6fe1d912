"""Room on a disk: what can wait is refused before the disk is full, so that what cannot has room."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedpeft.errors import DiskFull

MOST_SPARED = 1024**3
PART_SPARED = 20
"""If nothing else is said, a twentieth of the file system is spared, 1 GiB at most."""


class Room:
    """The room on the file system of a folder.

    Uploads, new runs and versions that are encoded for clients ask for room first. Nothing else does: the transactions
    of the database, and the fold of a round, after which its updates go, take what is spared for them.

    Args:
        folder: The folder.
        spared_bytes: Free bytes that are kept; None for a twentieth of the file system, 1 GiB at most.
    """

    def __init__(self, folder: Path, spared_bytes: int | None = None) -> None:
        self._folder = folder
        self._given = spared_bytes

    @property
    def spared_bytes(self) -> int:
        """Free bytes that are kept; looks at the disk."""
        if self._given is not None:
            return self._given
        return min(MOST_SPARED, shutil.disk_usage(self._folder).total // PART_SPARED)

    def check(self, what: str, size_bytes: int) -> None:
        """Checks that there is room for so many bytes; waits for the disk.

        Raises:
            DiskFull: If fewer than the spared ones would be free.
            OSError: If the folder cannot be looked at.
        """
        free, spared = shutil.disk_usage(self._folder).free, self.spared_bytes
        if free - size_bytes < spared:
            raise DiskFull(
                f"{what} takes {size_bytes:,} bytes, and {free:,} are free on the disk of {self._folder}, of which "
                f"{spared:,} are kept for the server itself; free some space"
            )
