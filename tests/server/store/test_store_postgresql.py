"""PostgreSQL that is slow, locked, silent or gone: each wait ends, and its error says what was waited for."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable
from fedpeft_server.store.connection import connect
from fedpeft_server.store.database import Database
from fedpeft_server.timing import TIMING

from ..rows import run_row, version_row

SHORT = replace(TIMING, database_busy_s=1.0, database_lost_s=2.0, database_idle_s=1.0)


def test_daemons_that_start_at_once_on_a_new_database_all_open_it(postgresql_url: str) -> None:
    ready = threading.Barrier(8)

    def opens(_: int) -> list[object]:
        ready.wait()
        database = Database.open(postgresql_url, TIMING)
        try:
            return list(database.runs())
        finally:
            database.close()

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(opens, range(8))) == [[]] * 8


def test_a_lock_held_elsewhere(postgresql_url: str) -> None:
    database, other = Database.open(postgresql_url, SHORT), connect(postgresql_url, TIMING)
    with other.begin() as connection:
        connection.execute(text("LOCK TABLE runs"))
        with pytest.raises(DatabaseLocked, match="locked by another session for 1 s"):
            database.create_run(run_row(), version_row(0))
    database.create_run(run_row(), version_row(0))
    database.close()
    other.dispose()


def test_a_statement_that_takes_for_ever_and_a_transaction_that_does_nothing(postgresql_url: str) -> None:
    database = Database.open(postgresql_url, SHORT)
    with (
        pytest.raises(DatabaseUnavailable, match="did not answer within 2 s"),
        database.transactions.begin() as connection,
    ):
        connection.execute(text("SELECT pg_sleep(10)"))
    with pytest.raises(DatabaseUnavailable), database.transactions.begin() as connection:
        connection.execute(text("SELECT 1"))
        time.sleep(1.5)
    assert database.runs() == [], "with another connection"
    database.close()


def test_a_server_that_takes_the_connection_and_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / ".s.PGSQL.5432"))
        silent.listen()
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="timeout"):
            Database.open(f"postgresql://postgres@/nothing?host={tmp_path}", SHORT)
        assert time.monotonic() - began < 10


def test_a_url_decides_where_it_says_something(postgresql_url: str) -> None:
    engine = connect(postgresql_url + "&connect_timeout=7&options=-c%20statement_timeout%3D7000", SHORT)
    with engine.begin() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        given = driver.info.get_parameters()
        shown = [connection.execute(text(f"SHOW {name}")).scalar() for name in ("statement_timeout", "lock_timeout")]
    engine.dispose()
    assert given["connect_timeout"] == "7" and given["tcp_user_timeout"] == "2000"
    assert shown == ["7s", "1s"]
