"""Mounted file systems, and the sizes of folders on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import psutil


class Mount(NamedTuple):
    """A mounted file system: its device, where it is mounted, its type."""

    device: str
    place: str
    type: str


def mount_of(path: str | os.PathLike[str]) -> Mount | None:
    """Returns what a path is on; None where the system does not say."""
    place = Path(os.path.realpath(path))
    try:
        mounts = [Mount(each.device, each.mountpoint, each.fstype) for each in psutil.disk_partitions(all=True)]
    except OSError:
        return None
    # Of two that are mounted at one place the later one hides the other.
    return max(reversed([m for m in mounts if place.is_relative_to(m.place)]), key=lambda m: len(m.place), default=None)


def tree_bytes(folder: Path) -> int:
    """Returns the bytes of all files below a folder, as far as they are still there; 0 if it is not."""
    return sum(file_bytes(Path(at, name)) for at, _, names in os.walk(folder) for name in names)


def file_bytes(path: Path) -> int:
    """Returns the bytes of a file; 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
