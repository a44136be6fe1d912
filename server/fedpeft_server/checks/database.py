"""The database under a check: sound, of a schema that this code knows, and read without changing it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from alembic.script import ScriptDirectory
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import ArgumentError

from fedpeft.errors import FedpeftError
from fedpeft_server.checks.findings import Report
from fedpeft_server.store import DATABASE_FILE
from fedpeft_server.store.connection import connect, opening, reading, shown, sqlite_file
from fedpeft_server.store.database import Database
from fedpeft_server.store.migrations import schema, scripts
from fedpeft_server.timing import TIMING

RESTORE = "restore the database from a backup"
EMPTY = "the database is empty: nothing of a server is in it"
MOST = 20
"""Most faults of SQLite's own check that are told."""


@contextmanager
def opened(url: str, report: Report) -> Iterator[Database | None]:
    """Gives the database of a URL for reading; None if it cannot be read, which is reported.

    A SQLite database of an earlier schema is copied, and the copy migrated: what is checked stays as it is.
    """
    path = sqlite_file(url)
    if path is not None and not path.is_file():
        report.fault(str(path), "there is no database", f"name its folder with --data-dir, or {RESTORE}")
        yield None
        return
    if path is not None and not path.stat().st_size:
        report.fault(str(path), EMPTY, RESTORE)
        yield None
        return
    try:
        engine = connect(url, TIMING)
    except FedpeftError as error:
        report.fault("database", error.message, RESTORE)
        yield None
        return
    with TemporaryDirectory(prefix="fedpeft-check-") as scratch:
        try:
            if path is not None:
                _check_sqlite(engine, report)
            found = _at_newest(engine, path, Path(scratch), report)
        except FedpeftError as error:
            report.fault("database", error.message, RESTORE)
            engine.dispose()
            found = None
        yield found
        if found is not None:
            found.close()


def without_password(url: str) -> str:
    """Returns a URL as it may be shown."""
    try:
        return shown(make_url(url))
    except ArgumentError:
        return url


def _check_sqlite(engine: Engine, report: Report) -> None:
    with opening(engine, TIMING), reading(engine) as connection:
        for fault in connection.execute(text(f"PRAGMA integrity_check({MOST})")).scalars():
            if fault != "ok":
                report.fault("database", str(fault), RESTORE)
        for table, row, parent, _ in connection.execute(text("PRAGMA foreign_key_check")).fetchmany(MOST):
            report.fault("database", f"row {row} of {table} refers to a row of {parent} that is not there", RESTORE)


def _at_newest(engine: Engine, path: Path | None, scratch: Path, report: Report) -> Database | None:
    known = scripts()
    with opening(engine, TIMING):
        current = schema(engine)
    head = known.get_current_head()
    if current == head:
        return Database(engine, TIMING)
    if current is None:
        report.fault(str(path or "database"), EMPTY, RESTORE)
        engine.dispose()
        return None
    if not _is_known(known, current):
        report.fault("database", f"its schema {current} is newer than {head}", "check it with the newer release")
        engine.dispose()
        return None
    report.note("database", f"its schema {current} is older than {head}", "a start of the server migrates it")
    engine.dispose()
    if path is None:
        report.fault("database", "what is in it was not checked", "start the server once, stop it, and check again")
        return None
    copy = scratch / DATABASE_FILE
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return Database.open(f"sqlite:///{copy}", TIMING)


def _is_known(known: ScriptDirectory, revision: str) -> bool:
    return revision in {script.revision for script in known.walk_revisions()}
