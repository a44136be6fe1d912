"""INSERT ... ON CONFLICT, which SQLite and PostgreSQL spell alike and SQLAlchemy apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Table
from sqlalchemy.dialects import postgresql, sqlite


def upsert(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    replace: Sequence[str] = (),
    add: Sequence[str] = (),
) -> None:
    """Inserts rows, as one batch; where the primary key is taken, some columns are replaced or added to.

    Args:
        connection: In a transaction.
        table: Where.
        rows: All with the same keys.
        replace: Columns that take the new value.
        add: Columns to which the new value is added; these or `replace` must name one.
    """
    if not rows:
        return
    insert = (postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert)(table)
    changes: dict[str, ColumnElement[Any]] = {name: insert.excluded[name] for name in replace}
    changes |= {name: table.c[name] + insert.excluded[name] for name in add}
    statement = insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=changes)
    connection.execute(statement, list(rows))
