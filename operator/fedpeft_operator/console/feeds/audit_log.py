"""Reading the audit log from its end, which the server gives from its beginning.

Numbers have no gap, so the newest is found by asking whether there is anything after a number: in doubling steps, then
by halves. It is remembered, and the next look begins there.
"""

from __future__ import annotations

from fedpeft.api.operator_client import OperatorClient
from fedpeft.identity.audit import AuditEntry
from fedpeft_operator.console.feeds.server_connection import ServerConnection


class AuditLog:
    """The audit log of the server.

    Args:
        connection: Connection to the server.
    """

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._newest = 0

    async def newest(self) -> int:
        """Returns the number of the newest entry; 0 if there is none."""
        known, step = self._newest, 1
        while await self._has(known + step - 1):
            known, step = known + step, 2 * step
        low, high = known, known + step - 1  # there is an entry `low`, and none after `high`
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if await self._has(middle) else (low, middle)
        self._newest = low
        return low

    async def until(self, number: int, most: int) -> list[AuditEntry]:
        """Returns the entries up to a number, at most so many, oldest first."""
        after = max(0, number - most)

        async def read(server: OperatorClient) -> list[AuditEntry]:
            found: list[AuditEntry] = []
            async for entry in server.audit(after):
                if entry.number > number:
                    break
                found.append(entry)
            return found

        return await self._connection.ask(read) if number else []

    async def _has(self, after: int) -> bool:
        """Returns True if there is an entry after a number."""

        async def read(server: OperatorClient) -> bool:
            async for _ in server.audit(after):
                return True
            return False

        return await self._connection.ask(read)
