"""Connections to PostgreSQL, none of which waits without end: the server has one thread for its transactions."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL

BUSY_S = 10
"""Time that is waited for a connection, and by a statement for a lock of another session, seconds: as with SQLite."""
LOST_S = 60
"""Longer than any statement of the server takes. After so long one is cancelled, a peer that does not answer is given
up, and PostgreSQL ends a transaction in which nothing happens, so that a server that hangs holds no lock."""
_PROBES = 3

LOCKED = "55P03"
"""The state with which PostgreSQL says that another session held a lock for too long."""
UNDONE = ("40001", "40P01")
"""The states of a transaction that was undone in favour of another session's; it can be made again."""


def engine(url: URL, **options: Any) -> Engine:
    """Returns an engine for a URL of PostgreSQL; what the URL says itself about waits counts."""
    pause_s = max(1, LOST_S // (2 * _PROBES))
    defaults = {
        "connect_timeout": BUSY_S,
        "keepalives_idle": LOST_S // 2,
        "keepalives_interval": pause_s,
        "keepalives_count": _PROBES,
        "tcp_user_timeout": LOST_S * 1000,
    }
    arguments = {name: value for name, value in defaults.items() if name not in url.query}
    made = create_engine(url, pool_pre_ping=True, connect_args=arguments, **options)
    limits = {
        "lock_timeout": BUSY_S * 1000,
        "statement_timeout": LOST_S * 1000,
        "idle_in_transaction_session_timeout": LOST_S * 1000,
    }

    @event.listens_for(made, "connect")
    def _limit(connection: Any, _record: Any) -> None:
        # Not among the options of the connection, which a pooler between may refuse.
        for name, limit_ms in limits.items():
            if name not in str(url.query.get("options", "")):
                connection.execute(f"SET {name} = {limit_ms}")
        connection.commit()

    return made


def unlimited(connection: Connection) -> None:
    """Lets the statements of a transaction take their time: a migration may rewrite large tables."""
    connection.execute(text("SET LOCAL statement_timeout = 0"))


CORRUPT = ("XX001", "XX002")
"""The states of data and of an index that are damaged."""


def fault(cause: BaseException, sqlstate: str, words: str) -> str:
    """Returns why the database cannot be used for now, and what to do; empty if a statement is at fault.

    Args:
        cause: The driver's error.
        sqlstate: The state that the server gave; empty where there was no server to give one.
        words: The driver's message.
    """
    match sqlstate:
        case "57014":
            return f"did not answer within {LOST_S} s; see what it is busy with (pg_stat_activity)"
        case "25P03":
            return f"ended a transaction in which nothing happened for {LOST_S} s: the server stood still"
        case "25006":
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
