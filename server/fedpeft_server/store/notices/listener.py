"""Listens to the notices of the other daemons on a PostgreSQL, on a connection of its own that is made again if lost.

Each daemon tells every second that it is there, and PostgreSQL tells it to itself as well: a connection on which
nothing is heard is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog
from sqlalchemy import Engine

from fedpeft_server.store import postgresql
from fedpeft_server.store.notices.notices import CHANNEL, Notice
from fedpeft_server.timing import Timing

if TYPE_CHECKING:
    from psycopg import AsyncConnection

log = structlog.get_logger()


class Listener:
    """Hears the notices of others.

    Args:
        engine: Of the database.
        own: Id of this daemon, whose own notices are passed over.
        timing: Waits for the database, and pauses.
        heard: Called with each notice of another.
        began: Called whenever it begins to listen: notices from before it may be lost.
    """

    def __init__(
        self,
        engine: Engine,
        own: str,
        timing: Timing,
        heard: Callable[[Notice], None],
        began: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._own = own
        self._timing = timing
        self._heard = heard
        self._began = began

    async def listen(self) -> None:
        """Listens without end."""
        import psycopg  # only here: it is installed where PostgreSQL is used

        while True:
            try:
                async with await self._connect() as connection:
                    self._began()
                    await self._hear(connection)
            except (psycopg.Error, OSError, TimeoutError) as error:
                cause = " ".join(str(error).split())
                log.warning("other servers are not heard for now; listening again", cause=cause)
            await asyncio.sleep(self._timing.listen_retry_s)

    async def _connect(self) -> AsyncConnection[Any]:
        from psycopg import AsyncConnection, sql

        url, dialect = self._engine.url, self._engine.dialect
        _, named = dialect.create_connect_args(url)
        arguments = {**postgresql.arguments(url, self._timing), **named}
        connection = await AsyncConnection.connect(**arguments, autocommit=True)
        try:
            row = await (await connection.execute("SELECT current_schema()")).fetchone()
            assert row is not None
            await connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(f"{CHANNEL}{row[0]}")))
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _hear(self, connection: AsyncConnection[Any]) -> None:
        """Passes notices on.

        Raises:
            TimeoutError: If nothing is heard, not even of this daemon.
        """
        while True:
            silent = True
            async for notification in connection.notifies(timeout=self._timing.daemon_gone_s):
                silent = False
                notice = Notice.parse(notification.payload)
                if notice is None:
                    log.warning("this is no notice of a server of this release", text=notification.payload[:80])
                elif notice.sender != self._own:
                    self._heard(notice)
            if silent:
                raise TimeoutError(f"nothing was heard for {self._timing.daemon_gone_s:g} s")
