"""Turns: a limited number of transfers at once, so that the server's memory does not grow with its clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedpeft.errors import TransfersBusy
from fedpeft_server.settings import HOLD_S


class Turns:
    """Lets `limit` transfers through at once, in the order in which they asked."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = asyncio.Semaphore(limit)
        self._taken: dict[str, int] = {}

    @asynccontextmanager
    async def take(self, client: str) -> AsyncIterator[None]:
        """Waits for a turn and holds it.

        Raises:
            TransfersBusy: If none comes within `HOLD_S`.
        """
        try:
            async with asyncio.timeout(HOLD_S):
                await self._free.acquire()
        except TimeoutError:
            raise TransfersBusy(
                f"{self._limit} other transfers are under way, the most this server serves at once; try again"
            ) from None
        self._taken[client] = self._taken.get(client, 0) + 1
        try:
            yield
        finally:
            self._free.release()
            self._taken[client] -= 1
            if not self._taken[client]:
                del self._taken[client]

    def has(self, client: str) -> bool:
        """Says whether a client's transfer is under way."""
        return client in self._taken
