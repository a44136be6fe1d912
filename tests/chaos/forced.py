"""The bytes and names that a process forced to its disk, noted outside of it: a power failure takes the rest away.

A record is a line of JSON: the inode, and the base64 of a file's bytes or the names in a folder. One that death cut
off stands for a sync that nobody was told of. A file that could not be forced counts as never forced: the kernel says
the error once, and takes the pages for written.
"""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path
from typing import Any

from simulated_time.disk import Disk


class Journal:
    """The notes of one process, which are appended to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def forced(self, descriptor: int) -> None:
        """Notes a sync."""
        place = f"/proc/self/fd/{descriptor}"
        if os.path.isdir(place):
            self._note(descriptor, names={entry.name: entry.inode() for entry in os.scandir(descriptor)})
        elif os.path.isfile(place):
            size = os.fstat(descriptor).st_size
            with open(place, "rb") as file:  # of its own: the descriptor may be for writing only
                self._note(descriptor, data=base64.b64encode(file.read(size)).decode())

    def failed(self, descriptor: int) -> None:
        """Notes a sync that failed."""
        self._note(descriptor, failed=True)

    def _note(self, descriptor: int, **what: Any) -> None:
        line = json.dumps({"inode": os.fstat(descriptor).st_ino, **what}) + "\n"
        os.write(self._file, line.encode())


class ForcedDisk(Disk):
    """A disk whose process notes what it forces."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._failed: set[int] = set()

    def take(self, journal: Path) -> None:
        """Takes up what a process that is over has noted."""
        if not journal.exists():
            return
        for line in journal.read_bytes().split(b"\n")[:-1]:
            note = json.loads(line)
            if "failed" in note:
                self._failed.add(note["inode"])
            elif "names" in note:
                self._names[note["inode"]] = note["names"]
            elif note["inode"] not in self._failed:
                self._bytes[note["inode"]] = base64.b64decode(note["data"])
        journal.unlink()

    def failed_over(self, path: Path, drawn: random.Random) -> ForcedDisk:
        """Copies what is left of the disk once the power is back."""
        self._copy(self.path, path, drawn)
        return ForcedDisk(path)
