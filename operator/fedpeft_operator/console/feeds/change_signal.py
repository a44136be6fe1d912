"""A counter of changes that tasks of one event loop can wait on."""

from __future__ import annotations

import asyncio


class ChangeSignal:
    """Counts changes, and lets tasks wait for the next one; for one event loop.

    Attributes:
        count: Changes so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Counts a change and wakes every task that waits."""
        self.count += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, count: int, timeout_s: float) -> bool:
        """Waits for a change beyond `count`; returns False if none came within `timeout_s`."""
        if self.count > count:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
