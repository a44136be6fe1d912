"""INSERT ... ON CONFLICT, which SQLite and PostgreSQL spell alike and SQLAlchemy apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Executable, Table
from sqlalchemy.dialects import postgresql, sqlite


def upsert(
    connection: Connection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    replace: Sequence[str] = (),
    add: Sequence[str] = (),
    only: ColumnElement[bool] | None = None,
) -> None:
    """Inserts rows, as one batch; where the primary key is taken, some columns are replaced or added to.

    Args:
        connection: In a transaction.
        table: The table.
        rows: All with the same keys.
        replace: Columns that take the new value.
        add: Columns to which the new value is added; these or `replace` must name one.
        only: A condition on the row that is there; one that does not meet it stays as it is. One object for all calls.
    """
    if rows:
        statement = _statement(connection.dialect.name, table, tuple(replace), tuple(add), only)
        connection.execute(statement, list(rows))


@lru_cache(maxsize=256)
def _statement(
    dialect: str, table: Table, replace: tuple[str, ...], add: tuple[str, ...], only: ColumnElement[bool] | None
) -> Executable:
    """Builds the statement once: that takes several times as long as SQLite takes to execute it."""
    insert = (postgresql.insert if dialect == "postgresql" else sqlite.insert)(table)
    changes: dict[str, ColumnElement[Any]] = {name: insert.excluded[name] for name in replace}
    changes |= {name: table.c[name] + insert.excluded[name] for name in add}
    return insert.on_conflict_do_update(index_elements=list(table.primary_key), set_=changes, where=only)
