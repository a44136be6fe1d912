"""The bell that wakes everybody who shows something when anything has changed."""

from __future__ import annotations

import asyncio


class Bell:
    """Counts what has changed, and lets others wait for more; for one event loop.

    Attributes:
        count: Changes so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wakes everybody who waits."""
        self.count += 1
        self._rung.set()
        self._rung = asyncio.Event()

    async def after(self, count: int, patience_s: float) -> bool:
        """Waits until there were more changes than `count`; returns False if there were none for `patience_s`."""
        if self.count > count:
            return True
        try:
            async with asyncio.timeout(patience_s):
                await self._rung.wait()
        except TimeoutError:
            return False
        return True
