"""The schema and its migrations, and what goes wrong with a database."""

from __future__ import annotations

import math
import sqlite3
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable, DiskFull, StateInvalid
from fedpeft_server.store import tables
from fedpeft_server.store.connection import connect
from fedpeft_server.store.database import Database
from fedpeft_server.timing import TIMING

from ..rows import RUN, opened, run_row, version_row, write


@pytest.fixture(autouse=True)
def migrations_once() -> None:
    """Nothing is copied here: each database is migrated."""


class TestSchema:
    def test_the_migrations_make_the_tables_of_the_code(self, url: str) -> None:
        Database.open(url, TIMING).close()
        engine = connect(url, TIMING)
        with engine.begin() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        engine.dispose()

    def test_opening_again_changes_nothing(self, url: str) -> None:
        for _ in range(2):
            database = Database.open(url, TIMING)
            if not database.runs():
                database.create_run(run_row(), version_row(0))
            assert [r.id for r in database.runs()] == [RUN]
            database.close()

    def test_a_newer_schema_asks_for_a_newer_server(self, url: str) -> None:
        Database.open(url, TIMING).close()
        engine = connect(url, TIMING)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        engine.dispose()
        with pytest.raises(StateInvalid, match=r"schema 9999.*upgrade the server"):
            Database.open(url, TIMING)

    def test_who_was_enrolled_again_before_restorations_were_known_is_not_refused(self, url: str) -> None:
        engine = connect(url, TIMING)
        config = Config()
        config.set_main_option("script_location", "fedpeft_server.store:migrations")
        config.set_main_option("path_separator", "os")
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "0003")
            for name, issued in (("back", 20.0), ("gone", 5.0)):
                row = {"name": name, "issued": issued}
                insert = (
                    "INSERT INTO identities (role, name, issued_at, revoked_at) VALUES ('client', :name, :issued, 10)"
                )
                connection.execute(text(insert), row)
        engine.dispose()
        database = Database.open(url, TIMING)
        assert [row.refused_until for row in database.identities.after(("", ""))] == [10.0, math.inf]
        database.close()

    def test_sqlite_loses_nothing_and_keeps_references(self, sqlite_url: str) -> None:
        engine = connect(sqlite_url, TIMING)
        with engine.connect() as connection:
            pragmas = [
                connection.execute(text(f"PRAGMA {p}")).scalar()
                for p in ("journal_mode", "synchronous", "foreign_keys")
            ]
        engine.dispose()
        assert pragmas == ["wal", 2, 1]


class TestFaults:
    @pytest.mark.parametrize(
        "url",
        [
            "nonsense",
            "oracle+thin://x/y",
            "mysql://root:secret@x/y",
            "postgresql:/root:secret@x/y",
            "postgresql://root@127.0.0.1:secret/y",
            "postgresql://root:my@sec:ret@127.0.0.1/y",
            "postgresql://root@127.0.0.1/y?port=none",
            "sqlite:///file:memory?uri=true&vfs=memdb",
            "sqlite:///file:?uri=true",
            "sqlite:///:memory:",
        ],
    )
    def test_a_url_that_is_none(self, url: str) -> None:
        with pytest.raises(StateInvalid, match=r"^--database: [^\n]*$") as told:
            Database.open(url, TIMING)
        assert "sec" not in told.value.message

    @pytest.mark.parametrize("option", ["timeout=long", "check_same_thread=maybe", "cached_statements=x"])
    def test_a_parameter_that_the_driver_refuses(self, option: str, sqlite_url: str) -> None:
        with pytest.raises(StateInvalid, match=r"^--database: sqlite:.* cannot be used \(.*\); correct its"):
            Database.open(f"{sqlite_url}?{option}", TIMING)

    def test_a_password_among_the_parameters_is_not_shown(self, tmp_path: Path) -> None:
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        with pytest.raises(DatabaseUnavailable, match="cannot be reached") as told:
            Database.open(f"postgresql://postgres@/nothing?host={tmp_path}&password=secret", TIMING)
        assert "secret" not in told.value.message

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(StateInvalid, match="cannot be opened"):
            Database.open(f"sqlite:///{tmp_path / 'missing' / 'server.db'}", TIMING)

    def test_a_file_that_is_no_database(self, tmp_path: Path, sqlite_url: str) -> None:
        (tmp_path / "server.db").write_bytes(b"this is a letter to my aunt" * 1000)
        with pytest.raises(StateInvalid, match="corrupt"):
            Database.open(sqlite_url, TIMING)

    def test_a_database_with_overwritten_pages(self, tmp_path: Path, sqlite_url: str) -> None:
        database = Database.open(sqlite_url, TIMING)
        database.create_run(run_row(), version_row(0))
        write(database, opened(clients=500))
        database.close()
        with (tmp_path / "server.db").open("r+b") as file:
            file.seek(8 * 4096)
            file.write(b"\xa5" * 4096 * 20)
        with pytest.raises(StateInvalid, match="corrupt"):
            Database.open(sqlite_url, TIMING)

    def test_a_full_disk(self, sqlite_url: str) -> None:
        database = Database.open(sqlite_url, TIMING)
        database.create_run(run_row(), version_row(0))
        with database.transactions.engine.connect() as connection:
            connection.execute(text("PRAGMA max_page_count = 1"))
            connection.rollback()
        with pytest.raises(DiskFull, match="no room"):
            write(database, opened(clients=2000))
        with database.transactions.engine.connect() as connection:
            connection.execute(text("PRAGMA max_page_count = 100000"))
            connection.rollback()
        write(database, opened(clients=2000))
        database.close()

    def test_a_lock_held_elsewhere(self, tmp_path: Path, sqlite_url: str) -> None:
        database = Database.open(sqlite_url, TIMING)
        with database.transactions.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 50")
            connection.rollback()
        other = sqlite3.connect(tmp_path / "server.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseLocked, match=r"locked by another program for 10 s .*; end its transaction"):
            database.create_run(run_row(), version_row(0))
        assert database.runs() == [], "reading goes on"
        other.execute("ROLLBACK")
        other.close()
        database.create_run(run_row(), version_row(0))
        database.close()

    def test_a_postgresql_that_does_not_answer(self, tmp_path: Path) -> None:
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        with pytest.raises(DatabaseUnavailable, match="postgresql"):
            Database.open(f"postgresql://postgres@/nothing?host={tmp_path}", TIMING)
