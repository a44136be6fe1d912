"""SQL about clients; each function is a part of the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select, update

from fedpeft_server.store import tables
from fedpeft_server.store.queries.collation import bytewise
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import ClientRow

_CLIENT = select(tables.clients).where(tables.clients.c.id == bindparam("of_client"))


def put_client(
    connection: Connection, client: str, instance: str, role: str, capabilities: bytes, at: float, process: str
) -> None:
    """Writes who a client is; when it was first seen and what it contributed stay."""
    row = {
        "id": client,
        "instance": instance,
        "role": role,
        "capabilities": capabilities,
        "first_seen": at,
        "last_seen": at,
        "process": process,
    }
    upsert(connection, tables.clients, [row], replace=("instance", "role", "capabilities", "last_seen", "process"))


def touch(connection: Connection, seen: Mapping[str, float]) -> None:
    """Writes when clients were last seen; those that never registered are left out."""
    if seen:
        table = tables.clients
        statement = update(table).where(table.c.id == bindparam("client")).values(last_seen=bindparam("at"))
        connection.execute(statement, [{"client": client, "at": at} for client, at in seen.items()])


def select_client(connection: Connection, client: str) -> ClientRow | None:
    """Returns a client by id."""
    row = connection.execute(_CLIENT, {"of_client": client}).one_or_none()
    return None if row is None else _client(row)


def select_clients(connection: Connection, after: str = "", most: int | None = None) -> list[ClientRow]:
    """Returns clients whose id is above `after`, by id: all, or the first so many."""
    id_ = bytewise(connection, tables.clients.c.id)
    query = select(tables.clients).where(id_ > after).order_by(id_).limit(most)
    return [_client(row) for row in connection.execute(query)]


def _client(row: Row[Any]) -> ClientRow:
    return ClientRow(
        row.id,
        row.instance,
        row.role,
        bytes(row.capabilities),
        row.first_seen,
        row.last_seen,
        row.updates,
        row.process,
    )
