"""Durable state: the database, adapter versions, spooled updates."""

from __future__ import annotations

from pathlib import Path

DATABASE_FILE = "fedpeft.db"
"""Name in a data folder of the SQLite database that a server has where no other is named."""


def database_url(database: str, folder: Path) -> str:
    """Returns the URL of a server's database; `database` is empty for SQLite in the data folder."""
    return database or f"sqlite:///{folder / DATABASE_FILE}"
