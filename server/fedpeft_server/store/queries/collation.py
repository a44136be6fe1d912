"""Text in the order of its bytes, which is Python's, whatever order a PostgreSQL was set up with."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, collate


def bytewise(connection: Connection, column: Column[Any]) -> ColumnElement[Any]:
    """Returns a text column as it is to be compared and sorted; SQLite does so anyway."""
    return collate(column, "C") if connection.dialect.name == "postgresql" else column
