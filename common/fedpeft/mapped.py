"""Files mapped into memory, read-only, and their pages given back once they were read."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path


def mapped(path: Path) -> memoryview:
    """Maps a file into memory, read-only; it stays mapped for as long as something views it."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        # Not closed by hand: arrays that look into it may be alive in a traceback, and then closing fails.
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def releaser(view: memoryview) -> Callable[[], object] | None:
    """Returns what gives the pages of a mapped file back; None for other memory.

    Without it every update that is read counts as the process's memory until it is unmapped.
    """
    mapping = view.obj
    return partial(mapping.madvise, mmap.MADV_DONTNEED) if isinstance(mapping, mmap.mmap) else None
