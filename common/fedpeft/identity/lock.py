"""One writer of an identity folder at a time: a renewal by one process is a renewal for all that use the folder."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fedpeft.errors import StateInvalid
from fedpeft.process import durable, locks

LOOK_S = 0.05
"""Interval of the attempts at the lock, seconds: a wait for a lock cannot be interrupted."""


@asynccontextmanager
async def held(folder: Path, wait_s: float) -> AsyncIterator[None]:
    """Holds an identity folder; the end of the process lets it go too.

    Args:
        folder: The folder, which exists. It is locked itself, so one that cannot be written can be held.
        wait_s: Longest wait.

    Raises:
        StateInvalid: If another process holds it for longer, or it cannot be opened.
    """
    deadline = time.monotonic() + wait_s
    with durable.refusals(f"opening {folder}"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # On a file system without locks files are replaced whole too, only perhaps twice.
        while locks.attempt(descriptor) is False:
            if time.monotonic() > deadline:
                raise StateInvalid(f"another process has held {folder} for {wait_s:g} s; end it if it hangs")
            await asyncio.sleep(LOOK_S)
        yield
    finally:
        os.close(descriptor)
