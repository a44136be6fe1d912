"""PostgreSQL that is slow, locked, silent or gone: each wait ends, and its error says what was waited for."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable, StateInvalid
from fedpeft_server.store.connection import connect
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import AnswerRow, AuditEvent
from fedpeft_server.timing import TIMING

from ..rows import RUN, run_row, version_row

CHARACTERS = "größer als Ω, 大 and 🙂"
SHORT = replace(TIMING, database_busy_s=1.0, database_lost_s=2.0, database_idle_s=1.0)


def test_characters_are_kept_whatever_encoding_connections_are_given(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    database = Database.open(postgresql_url, TIMING)
    events = [AuditEvent(CHARACTERS, "tried", f"{number}") for number in range(3)]
    database.transactions.write(*events)
    database.create_run(run_row(), version_row(0))
    database.put_answers([AnswerRow(RUN, f"c{number}", False, (CHARACTERS,)) for number in range(3)])
    assert [entry.actor for entry in database.transactions.entries_after(0, 9)] == [CHARACTERS] * 3
    assert [answer.reasons for answer in database.answers()] == [(CHARACTERS,)] * 3
    database.close()


def test_a_database_that_cannot_hold_all_characters_is_refused(postgresql_url: str) -> None:
    engine = create_engine(make_url(postgresql_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    name = f"{engine.url.database}_latin1"
    with engine.connect() as admin:
        admin.execute(text(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"))
    engine.dispose()
    latin1 = make_url(postgresql_url).set(database=name).render_as_string()
    with pytest.raises(StateInvalid, match=r"is encoded in LATIN1, .* made with ENCODING 'UTF8'"):
        Database.open(latin1, TIMING)


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


class Line:
    """A line to PostgreSQL that passes so many bytes of the client's on once it is told to, and then none."""

    def __init__(self, postgres: Path) -> None:
        self._socket = str(postgres / ".s.PGSQL.5432")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.left: int | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        self._client, _ = self._listener.accept()
        with self._client as client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._socket)
            threading.Thread(target=self._back, args=(server, client), daemon=True).start()
            with suppress(OSError):  # the server has hung up
                while data := client.recv(4096):
                    if self.left is not None:
                        data, self.left = data[: self.left], max(0, self.left - len(data))
                    server.sendall(data)

    @staticmethod
    def _back(server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):  # the client has hung up
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        with suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("passed", [0, 100, 10_000])
def test_a_server_that_stands_still_amid_many_rows_holds_no_lock(
    postgres: Path, postgresql_url: str, passed: int
) -> None:
    """In a pipeline of psycopg's PostgreSQL ends no transaction, whatever its settings are."""
    line, name = Line(postgres), make_url(postgresql_url).database
    engine = connect(f"postgresql://postgres@127.0.0.1:{line.port}/{name}", SHORT)
    other = connect(postgresql_url, SHORT)
    rows = [{"number": number, "said": "it's 100 %, or \\ and :more"} for number in range(500)]
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE held (number integer, said text)"))
        connection.execute(text("INSERT INTO held VALUES (:number, :said)"), rows)
    with other.begin() as connection:
        assert connection.execute(text("SELECT count(*), min(said) FROM held")).one() == (500, rows[0]["said"])

    def stands_still() -> None:
        with engine.begin() as connection:
            connection.execute(text("LOCK TABLE held"))
            line.left = passed
            connection.execute(text("UPDATE held SET said = :said WHERE number = :number"), rows)

    with ThreadPoolExecutor(1) as thread, closing(line):
        standing = thread.submit(stands_still)
        while line.left is None:
            time.sleep(0.01)
        time.sleep(SHORT.database_idle_s + 0.5)
        with other.begin() as connection:
            connection.execute(text("LOCK TABLE held"))
        with pytest.raises(DBAPIError):
            standing.result()
    engine.dispose()
    other.dispose()
