"""The connections of a server to its SQLite database, the one that writes and those that only read."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable

from sqlalchemy import event

from .conftest import Daemon


def on_each_connection(daemon: Daemon, configure: Callable[[sqlite3.Connection], None]) -> None:
    """Calls a function with the connection that writes, and with each that reads whenever it is taken for a reading."""
    transactions = daemon.server.store.db.transactions
    writing = transactions.engine.raw_connection().driver_connection
    assert isinstance(writing, sqlite3.Connection)
    configure(writing)
    event.listen(transactions.readers, "checkout", lambda connection, *_: configure(connection))
