"""SQL about clients; each function is a part of the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Text, bindparam, literal_column, or_, select, tuple_, update

from fedpeft_server.store import tables
from fedpeft_server.store.queries.batches import batches
from fedpeft_server.store.queries.collation import bytewise
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import ClientRow

_held = tuple_(tables.clients.c.instance, tables.clients.c.process)
_FOLLOWED = or_(
    _held == tuple_(bindparam("was_instance", type_=Text), bindparam("was_process", type_=Text)),
    _held == tuple_(literal_column("excluded.instance"), literal_column("excluded.process")),
)
"""The row there is the one that a registration follows, or its own."""
_CLIENT = select(tables.clients).where(tables.clients.c.id == bindparam("of_client"))


def put_clients(connection: Connection, clients: Sequence[ClientRow]) -> list[bool]:
    """Writes who clients are, the last row of each; when one was first seen and what it contributed stay.

    Returns:
        For each row False if its client has another by then: one that `follows` does not name is not replaced.
    """
    last = {client.id: client for client in clients}
    replaced = ("instance", "role", "capabilities", "last_seen", "process")
    judged = [client for client in last.values() if client.follows is not None]
    others = [client for client in last.values() if client.follows is None]
    upsert(connection, tables.clients, list(map(_columns, others)), replace=replaced)
    rows = [{**_columns(c), "was_instance": c.follows[0], "was_process": c.follows[1]} for c in judged if c.follows]
    upsert(connection, tables.clients, rows, replace=replaced, only=_FOLLOWED)
    held = {row.id: (row.instance, row.process) for row in select_named(connection, [client.id for client in judged])}
    return [held.get(c.id, (c.instance, c.process)) == (c.instance, c.process) for c in clients]


def _columns(client: ClientRow) -> dict[str, Any]:
    return {
        "id": client.id,
        "instance": client.instance,
        "role": client.role,
        "capabilities": client.capabilities,
        "first_seen": client.first_seen,
        "last_seen": client.last_seen,
        "process": client.process,
    }


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


def select_seen(connection: Connection, since: float) -> dict[str, float]:
    """Returns when those clients were last seen that were since a time."""
    table = tables.clients
    rows = connection.execute(select(table.c.id, table.c.last_seen).where(table.c.last_seen >= since))
    return {row.id: row.last_seen for row in rows}


def select_named(connection: Connection, clients: Sequence[str]) -> list[ClientRow]:
    """Returns those of some clients that are known."""
    queries = (select(tables.clients).where(tables.clients.c.id.in_(some)) for some in batches(clients))
    return [_client(row) for query in queries for row in connection.execute(query)]


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
