"""Connections to PostgreSQL, none of which waits without end: the server has one thread for its transactions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, ExceptionContext, ExecutionContext

from fedpeft.errors import StateInvalid
from fedpeft_server.store.queries.batches import batches
from fedpeft_server.timing import Timing

_PROBES = 3
_ROWS = 1000
"""Most rows for which statements go in one message."""
_STATUS_S = 0.05
"""Pause between two looks at a transaction that is under way."""

LOCKED = "55P03"
"""The state with which PostgreSQL says that another session held a lock for too long."""
READ_ONLY = "25006"
"""The state of a session that may write nothing; one that begins later may again, where a disk was full for a while."""
UNDONE = ("40001", "40P01", "23503", "23505")
"""The states of a transaction that was undone in favour of another session's; it can be made again. The last two are
those of a row that refers to one which another session has deleted, or has added, since the transaction looked."""


def arguments(url: URL, timing: Timing) -> dict[str, Any]:
    """Returns the arguments of a connection: its encoding, and bounds of its waits but those that the URL has."""
    busy_s, lost_s = round(timing.database_busy_s), round(timing.database_lost_s)
    pause_s = max(1, lost_s // (2 * _PROBES))
    defaults = {
        "connect_timeout": max(1, busy_s),
        "keepalives_idle": max(1, lost_s // 2),
        "keepalives_interval": pause_s,
        "keepalives_count": _PROBES,
        "tcp_user_timeout": _ms(timing.database_lost_s),
    }
    given = {name: value for name, value in defaults.items() if name not in url.query}
    return given | {"client_encoding": "utf8"}  # which a variable, or a setting of the database, may say otherwise


def engine(url: URL, timing: Timing, *, idle_s: float, **options: Any) -> Engine:
    """Returns an engine for a URL of PostgreSQL; what the URL says itself about waits counts.

    PostgreSQL ends a transaction of it in which nothing happens for `idle_s` seconds.
    """
    made = create_engine(url, pool_pre_ping=True, connect_args=arguments(url, timing), **options)
    limits = {
        "lock_timeout": _ms(timing.database_busy_s),
        "statement_timeout": _ms(timing.database_lost_s),
        "idle_in_transaction_session_timeout": _ms(idle_s),
    }

    @event.listens_for(made, "connect")
    def _limit(connection: Any, _record: Any) -> None:
        # Not among the options of the connection, which a pooler between may refuse.
        for name, limit_ms in limits.items():
            if name not in str(url.query.get("options", "")):
                connection.execute(f"SET {name} = {limit_ms}")
        connection.commit()

    @event.listens_for(made, "do_executemany")
    def _in_few_messages(cursor: Any, statement: str, rows: Sequence[Any], _: ExecutionContext) -> bool:
        """Takes the place of psycopg's own way, a pipeline: in one PostgreSQL ends no transaction that stands still."""
        from psycopg import ClientCursor  # only here: it is installed where PostgreSQL is used

        with ClientCursor(cursor.connection) as whole:
            for some in batches(rows, _ROWS):
                whole.execute(";".join(whole.mogrify(statement, row) for row in some).encode())
        return True

    @event.listens_for(made, "handle_error")
    def _replace(context: ExceptionContext) -> None:
        if getattr(context.original_exception, "sqlstate", "") == READ_ONLY:
            context.is_disconnect = True  # the pool's sessions would stay what they are

    return made


def _ms(seconds: float) -> int:
    """Returns a limit in milliseconds; PostgreSQL takes 0 for none."""
    return max(1, round(seconds * 1000))


def check_encoding(connection: Connection, where: str) -> None:
    """Refuses a database that cannot hold all characters: a name with one of the others would fail much later.

    Raises:
        StateInvalid: If it is one.
    """
    encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
    if encoding not in ("UTF8", "SQL_ASCII"):  # which keeps whatever bytes it is given
        raise StateInvalid(
            f"database {where} is encoded in {encoding}, which lacks most characters; dump it (pg_dump), and put it "
            "back into one that was made with ENCODING 'UTF8' TEMPLATE template0"
        )


def unlimited(connection: Connection) -> None:
    """Lets the statements of a transaction take their time: a migration may rewrite large tables."""
    connection.execute(text("SET LOCAL statement_timeout = 0"))


def transaction_number(connection: Connection) -> int:
    """Returns the number of a transaction, by which its outcome can be asked for once its connection is lost."""
    return int(connection.execute(text("SELECT txid_current()")).scalar_one())


def is_committed(connection: Connection, number: int, most_s: float) -> bool:
    """Returns True if a transaction was committed; one that is under way is waited for, for so many seconds at most."""
    until, status = time.monotonic() + most_s, text("SELECT txid_status(:number)")
    while (found := connection.execute(status, {"number": number}).scalar()) == "in progress":
        if time.monotonic() > until:
            return False
        time.sleep(_STATUS_S)
    return bool(found == "committed")


CORRUPT = ("XX001", "XX002")
"""The states of data and of an index that are damaged."""


def fault(cause: BaseException, sqlstate: str, words: str, lost_s: float) -> str:
    """Returns why the database cannot be used for now, and what to do; empty if a statement is at fault.

    Args:
        cause: The driver's error.
        sqlstate: The state that the server gave; empty where there was no server to give one.
        words: The driver's message.
        lost_s: Time after which a statement was cancelled.
    """
    match sqlstate:
        case "57014":
            return f"did not answer within {lost_s:g} s; see what it is busy with (pg_stat_activity)"
        case "25P03":
            return "ended a transaction in which nothing happened for too long: the server stood still"
        case _ if sqlstate == READ_ONLY:
            return f"takes nothing written ({words}): a standby after a failover? Name the primary with --database"
        case "53300":
            return f"takes no more connections ({words}); raise max_connections, or end some"
        case "53200" | "53400" | "58000" | "58030":
            return f"has no memory, or its disk fails ({words}); see its log"
        case _ if sqlstate in CORRUPT:
            return f"is corrupt ({words}); restore it from a backup"
        case _ if sqlstate.startswith(("08", "57P")) or (not sqlstate and isinstance(cause, psycopg_error())):
            return f"cannot be reached ({words}); start it, or see whether name, network and password are right"
    return ""


def psycopg_error() -> type[Exception]:
    """Returns the class of what psycopg raises where no connection comes about, or one ends."""
    import psycopg  # only here: it is installed where PostgreSQL is used

    return psycopg.OperationalError
