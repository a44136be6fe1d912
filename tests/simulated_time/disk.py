"""The disk of a machine: what of it outlives the process, and what the power.

A process that dies leaves its files as they are at that instant. When the power fails, what was not forced to disk may
be gone: the bytes of a file since its last fsync, and names that appeared in a folder, or went from it, since that of
the folder. A folder that was renamed has its old name or the new one. SQLite's own files are taken as they are: it
forces them itself, where Python does not see it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = 4096
SQLITE = ("fedpeft.db", "fedpeft.db-wal", "fedpeft.db-shm", "fedpeft.db-journal")


class Disk:
    """A folder, and what of it is certain to outlive the power.

    Args:
        path: The folder, with nothing in it or with what is durable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._back: dict[int, Path | None] = {}
        path.mkdir(parents=True, exist_ok=True)
        for place in _places(path):
            self._forced(place)

    def forced(self, descriptor: int) -> None:
        """Notes an fsync."""
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if place.is_relative_to(self.path):
            self._forced(place)

    def _forced(self, place: Path) -> None:
        node = place.stat().st_ino
        if place.is_dir():
            self._names[node] = {entry.name: entry.inode() for entry in os.scandir(place)}
        elif place.is_file():
            self._bytes[node] = place.read_bytes()

    def after_a_kill(self, path: Path) -> Disk:
        """Copies the disk as it is; what was not forced is not forced yet."""
        shutil.copytree(self.path, path, symlinks=True)
        copy = Disk.__new__(Disk)
        copy.path, copy._bytes, copy._names = path, dict(self._bytes), {}
        now = {place.stat().st_ino: (path / place.relative_to(self.path)).stat().st_ino for place in _places(self.path)}
        copy._bytes.update({now[node]: data for node, data in self._bytes.items() if node in now})
        for node, names in self._names.items():
            if node in now:
                copy._names[now[node]] = {name: now.get(inode, inode) for name, inode in names.items()}
        return copy

    def after_a_power_failure(self, path: Path, drawn: random.Random) -> Disk:
        """Copies what is left of the disk once the power is back."""
        self._back = self._renamed_back(drawn)
        self._copy(self.path, path, drawn)
        return Disk(path)

    def _renamed_back(self, drawn: random.Random) -> dict[int, Path | None]:
        """Returns the places of renamed folders that get their old names back, by node; None for one that does not."""
        back: dict[int, Path | None] = {}
        sure = {node for names in self._names.values() for node in names.values()}
        for place in sorted(_places(self.path)):
            node = place.stat().st_ino
            named = self._names.get(place.parent.stat().st_ino, {}).get(place.name)
            if place.is_dir() and node in sure and named != node:
                back[node] = place if drawn.random() < 0.5 else None
        return back

    def _copy(self, source: Path, target: Path, drawn: random.Random) -> None:
        target.mkdir(parents=True)
        shutil.copymode(source, target)
        sure = self._names.get(source.stat().st_ino, {})
        now = {entry.name: entry.inode() for entry in os.scandir(source)}
        for name in sorted({*sure, *now}):
            if name in SQLITE:
                if name in now:  # it removes its log once all is in the database
                    shutil.copy2(source / name, target / name)
            elif now.get(name) in self._back:
                if self._back[now[name]] is None:
                    self._copy_entry(source / name, target / name, drawn)
            elif sure.get(name) == now.get(name) or (name in now and drawn.random() < 0.5):
                self._copy_entry(source / name, target / name, drawn)
            elif (place := self._back.get(sure.get(name, 0))) is not None:
                self._copy_entry(place, target / name, drawn)
            elif name in sure and sure[name] in self._bytes:  # what it was before
                (target / name).write_bytes(self._bytes[sure[name]])
                (target / name).chmod(0o600)

    def _copy_entry(self, source: Path, target: Path, drawn: random.Random) -> None:
        if source.is_symlink():
            target.symlink_to(os.readlink(source))
        elif source.is_dir():
            self._copy(source, target, drawn)
        else:
            target.write_bytes(self._left(source, drawn))
            shutil.copymode(source, target)

    def _left(self, file: Path, drawn: random.Random) -> bytes:
        data, sure = file.read_bytes(), self._bytes.get(file.stat().st_ino)
        if data == sure or drawn.random() < 0.3:
            return data
        if sure is not None and data.startswith(sure):  # it was appended to
            return data[: drawn.randint(len(sure), len(data))]
        if sure is not None and drawn.random() < 0.5:
            return sure
        kept = drawn.randint(0, len(data))
        return data[:kept] + bytes(drawn.choice((0, len(data) - kept)))


def _places(path: Path) -> Iterator[Path]:
    """Yields a folder and all in it, links excepted."""
    yield path
    for parent, folders, files in os.walk(path):
        for name in (*folders, *files):
            if not Path(parent, name).is_symlink():
                yield Path(parent, name)


def written(before: bytes, failed: bytes, data: bytes) -> bytes:
    """Returns the bytes of a file on its disk after a sync that was well, once one failed.

    Args:
        before: Its bytes on the disk until then.
        failed: Its bytes as a sync failed; none if none did.
        data: Its bytes as the sync was well.
    """
    pages = []
    for at in range(0, len(data), PAGE_BYTES):
        old, page = before[at : at + PAGE_BYTES], data[at : at + PAGE_BYTES]
        is_taken_for_written = page == failed[at : at + PAGE_BYTES] and page != old
        pages.append(old[: len(page)].ljust(len(page), b"\0") if is_taken_for_written else page)
    return b"".join(pages)
