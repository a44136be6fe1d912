"""The console's shared connection to the server, for the lists and figures that it reads repeatedly."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fedpeft.api.operator_client import Connect, OperatorClient
from fedpeft.errors import Unavailable

T = TypeVar("T")


class ServerConnection:
    """Reuses one client while the server answers, and replaces it after a failure: a broken channel backs off for long.

    It replaces the client from time to time as well, so that a renewed identity is used.

    A replaced client is closed by the last call that uses it, so no call is cut off by the failure of another.

    Args:
        connect: Makes a client.
    """

    def __init__(self, connect: Connect) -> None:
        self.connect = connect
        self._client: OperatorClient | None = None
        self._asking: Counter[OperatorClient] = Counter()
        self._opening = asyncio.Lock()

    async def ask(self, question: Callable[[OperatorClient], Awaitable[T]]) -> T:
        """Asks the server something.

        Raises:
            FedpeftError: What the server says, or that it is not there.
        """
        async with self._opening:
            if self._client is not None and self._client.is_stale:
                await self.close()
            client = self._client = self._client or await self.connect().__aenter__()
            self._asking[client] += 1
        try:
            return await question(client)
        except Unavailable:
            if self._client is client:
                self._client = None
            raise
        finally:
            self._asking[client] -= 1
            if self._client is not client:
                await self._close(client)

    async def close(self) -> None:
        """Ends the connection; the next question makes another."""
        client, self._client = self._client, None
        if client is not None:
            await self._close(client)

    async def _close(self, client: OperatorClient) -> None:
        if not self._asking[client]:
            del self._asking[client]
            await client.__aexit__(None, None, None)
