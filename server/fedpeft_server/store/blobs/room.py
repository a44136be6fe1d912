"""Room on the disks of a server: what can wait is refused before one is full, so that what cannot has room."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpeft.errors import DiskFull

MOST_SPARED = 1024**3
PART_SPARED = 20
"""If nothing else is said, a twentieth of each file system is spared, 1 GiB at most."""
DATA = "data"
"""Name of the data folder's disk."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that the server writes to.

    Attributes:
        place: Content of its folder: `data`, or `blobs` or `updates` where those are elsewhere.
        folder: Folder of the server on it.
        size_bytes: Size of the file system.
        free_bytes: Free space that this process may use.
        spared_bytes: Free space that uploads, new runs and encoded versions leave.
    """

    place: str
    folder: Path
    size_bytes: int
    free_bytes: int
    spared_bytes: int


class Room:
    """The room on the file system of the data folder, and on those of the other folders that the server writes to.

    Uploads, new runs and versions that are encoded for clients ask for room first. Nothing else does: the transactions
    of the database, and the fold of a round, after which its updates go, take what is spared for them. An upload asks
    on every disk: where the versions have none left, the round that it is for cannot be folded.

    Args:
        folder: The data folder.
        spared_bytes: Free bytes that are kept; None for a twentieth of each file system, 1 GiB at most.
        others: Other folders, by what is kept there; those on the data folder's file system are left out.

    Attributes:
        folders: The folders, by what is kept there, one a file system.
    """

    def __init__(self, folder: Path, spared_bytes: int | None = None, others: Mapping[str, Path] | None = None) -> None:
        self._given = spared_bytes
        self.folders = {DATA: folder}
        devices = {folder.stat().st_dev}
        for place, other in (others or {}).items():
            if (device := other.stat().st_dev) not in devices:
                devices.add(device)
                self.folders[place] = other

    def disk(self, place: str = DATA) -> Disk:
        """Looks at a disk.

        Raises:
            OSError: If it cannot be looked at.
        """
        usage = shutil.disk_usage(self.folders[place])
        spared = self._given if self._given is not None else min(MOST_SPARED, usage.total // PART_SPARED)
        return Disk(place, self.folders[place], usage.total, usage.free, spared)

    def disks(self) -> list[Disk]:
        """Looks at all disks; raises as `disk`."""
        return [self.disk(place) for place in self.folders]

    def check(self, what: str, size_bytes: int) -> None:
        """Checks that the data folder's disk has room for so many bytes; waits for the disk.

        Raises:
            DiskFull: If fewer than the spared ones would be free.
            OSError: If the folder cannot be looked at.
        """
        _check(self.disk(), what, size_bytes)

    def check_all(self, what: str, size_bytes: int) -> None:
        """Checks as `check` that every disk has room for what arrives, and for the version that it leads to."""
        for disk in self.disks():
            _check(disk, what, size_bytes)


def _check(disk: Disk, what: str, size_bytes: int) -> None:
    if disk.free_bytes - size_bytes < disk.spared_bytes:
        raise DiskFull(
            f"{what} takes {size_bytes:,} bytes, and {disk.free_bytes:,} are free on the disk of {disk.folder}, of "
            f"which {disk.spared_bytes:,} are kept for the server itself; free some space"
        )
