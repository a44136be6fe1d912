"""Files that are whole or absent after a crash at any instant: written aside, forced to disk, renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def force(path: Path) -> None:
    """Forces a file, or the entries of a folder, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replaces a file; after a crash it has the old content or the new."""
    aside = path.with_name(path.name + ".new")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    move(aside, path)


def move(source: Path, target: Path) -> None:
    """Renames, and forces both folders' entries to disk."""
    source.rename(target)
    force(target.parent)
    if source.parent != target.parent:
        force(source.parent)


def sha256(path: Path) -> bytes:
    """Returns the digest of a file, 32 bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
