"""SQL about the time; each function is a part of the caller's transaction."""

from __future__ import annotations

import time

from sqlalchemy import Connection, text

_NOW = text("SELECT extract(epoch FROM clock_timestamp())")


def select_now(connection: Connection) -> float:
    """Returns the time on the database's clock, which is this process's own where there is no server."""
    return float(connection.execute(_NOW).scalar_one()) if connection.dialect.name == "postgresql" else time.time()
