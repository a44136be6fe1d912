"""SQL about the audit log; each function is a part of the caller's transaction."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, insert, select, text

from fedpeft.identity.audit import AuditEntry
from fedpeft_server.store import tables

_INSERT = insert(tables.audit)
_LOCK = text("SELECT pg_advisory_xact_lock(hashtext('fedpeft audit ' || current_schema()))")


def lock(connection: Connection) -> None:
    """Has other servers wait with their next entry until the transaction ends: each follows the one before."""
    if connection.dialect.name == "postgresql":  # SQLite lets one program write at a time
        connection.execute(_LOCK)


def insert_entry(connection: Connection, entry: AuditEntry) -> None:
    """Adds an entry; the number of one that is there already is refused by the database."""
    connection.execute(_INSERT, asdict(entry))


def select_last(connection: Connection) -> AuditEntry | None:
    """Returns the newest entry, or None."""
    query = select(tables.audit).order_by(tables.audit.c.number.desc()).limit(1)
    row = connection.execute(query).one_or_none()
    return None if row is None else _entry(row)


def select_after(connection: Connection, number: int, most: int) -> list[AuditEntry]:
    """Returns the first so many entries above a number, oldest first."""
    query = select(tables.audit).where(tables.audit.c.number > number).order_by(tables.audit.c.number).limit(most)
    return [_entry(row) for row in connection.execute(query)]


def _entry(row: Row[Any]) -> AuditEntry:
    return AuditEntry(**row._mapping)
