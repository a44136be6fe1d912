"""The bytes and names that a process forced to its disk, noted outside of it: a power failure takes the rest away.

A record is a line of JSON: the inode, and the base64 of a file's bytes or the names in a folder. One that death cut
off stands for a sync that nobody was told of. After one that failed, the kernel says the error once and takes the pages
for written: those that are as they were then are not forced by a later one, which says that all is well.
"""

from __future__ import annotations

import base64
import json
import os
import random
from pathlib import Path
from typing import Any

from simulated_time.disk import Disk, written


class Journal:
    """The notes of one process, which are appended to."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def forced(self, descriptor: int) -> None:
        """Notes a sync."""
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            self._note(descriptor, names={entry.name: entry.inode() for entry in os.scandir(descriptor)})
        else:
            self._note_bytes("data", descriptor)

    def failed(self, descriptor: int) -> None:
        """Notes a sync that failed."""
        self._note_bytes("failed", descriptor)

    def _note_bytes(self, what: str, descriptor: int) -> None:
        place = f"/proc/self/fd/{descriptor}"
        if os.path.isfile(place):
            size = os.fstat(descriptor).st_size
            with open(place, "rb") as file:  # of its own: the descriptor may be for writing only
                self._note(descriptor, **{what: base64.b64encode(file.read(size)).decode()})

    def _note(self, descriptor: int, **what: Any) -> None:
        line = json.dumps({"inode": os.fstat(descriptor).st_ino, **what}) + "\n"
        os.write(self._file, line.encode())


class ForcedDisk(Disk):
    """A disk whose process notes what it forces."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._failed: dict[int, bytes] = {}

    def take(self, journal: Path) -> None:
        """Takes up what a process that is over has noted."""
        if not journal.exists():
            return
        for line in journal.read_bytes().split(b"\n")[:-1]:
            note = json.loads(line)
            if "failed" in note:
                self._failed[note["inode"]] = base64.b64decode(note["failed"])
            elif "names" in note:
                self._names[note["inode"]] = note["names"]
            else:
                node, data = note["inode"], base64.b64decode(note["data"])
                self._bytes[node] = written(self._bytes.get(node, b""), self._failed.get(node, b""), data)
        journal.unlink()

    def failed_over(self, path: Path, drawn: random.Random) -> ForcedDisk:
        """Copies what is left of the disk once the power is back."""
        self._copy(self.path, path, drawn)
        return ForcedDisk(path)

    def _left(self, file: Path, drawn: random.Random) -> bytes:
        node = file.stat().st_ino
        if node not in self._failed or node not in self._bytes:
            return super()._left(file, drawn)
        sure, data = self._bytes[node], file.read_bytes()
        return sure + data[len(sure) : drawn.randint(len(sure), max(len(sure), len(data)))]
