"""Connections: SQLite tuned to lose nothing, PostgreSQL by URL, and what goes wrong with either in one sentence."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import QueuePool, StaticPool

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable, DiskFull, FedpeftError, SettingsInvalid, StateInvalid
from fedpeft.process import durable, locks
from fedpeft.process.addresses import check_database_url
from fedpeft_server.store import DATABASE_FILE, postgresql
from fedpeft_server.timing import Timing

_READS = "fedpeft_reads"
"""Execution option of a connection whose transaction only reads."""

PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON")
"""WAL with FULL: a commit is one append and one fsync of the log, and survives the machine."""
_SECRETS = ("password", "sslpassword")
"""Parameters of PostgreSQL that no message shows."""


def connect(url: str, timing: Timing) -> Engine:
    """Returns an engine for a database URL: `sqlite:///PATH` or `postgresql://...`; connects and checks it.

    Raises:
        StateInvalid: If the URL is none, its driver is missing, or the database is corrupt or cannot be written.
        DatabaseUnavailable: If it cannot be reached.
    """
    parsed = parse(url)
    where = shown(parsed)
    try:
        engine = _engine(parsed, timing)
        with opening(engine, timing):
            _check(engine, where)
    except ModuleNotFoundError as error:
        raise StateInvalid(f"database {where} needs the Python package {error.name}, which is not installed") from None
    except (ArgumentError, ValueError, TypeError) as error:  # a parameter of the URL, for the driver
        raise StateInvalid(f"--database: {where} cannot be used ({error}); correct its parameters") from None
    return engine


def parse(url: str) -> URL:
    """Returns the parts of a database URL.

    Raises:
        StateInvalid: If it is none.
    """
    try:
        return _with_driver(make_url(check_database_url(url)))
    except ValueError as error:
        raise StateInvalid(f"--database: {error}") from None


def shown(url: URL) -> str:
    """Returns a URL as messages may show it: without secrets, and without the driver, which nobody names."""
    url = url.set(drivername=url.get_backend_name())
    return url.difference_update_query(_SECRETS).render_as_string(hide_password=True)


NOTE = "database"
"""Name in a data folder of the note on where its server's database is, if that is not in the folder."""


def refuse_to_forget(folder: Path, database: str) -> None:
    """Refuses to take a data folder whose server has its database elsewhere for one that has none.

    Args:
        folder: The data folder.
        database: URL of the database; empty for SQLite in the folder.

    Raises:
        SettingsInvalid: If no database is named, none is in the folder, and a server has worked with another one.
    """
    if not database and (folder / NOTE).exists() and not (folder / DATABASE_FILE).exists():
        noted = (folder / NOTE).read_text(encoding="utf-8", errors="replace").strip()[:200]
        raise SettingsInvalid(
            f"--data-dir {folder}: the database of its server is {noted}; name it with --database (or "
            f"FEDPEFT_SERVER_DATABASE), or remove {folder / NOTE} if there is to be a new one in the folder"
        )


def note_place(folder: Path, database: str) -> None:
    """Notes in a data folder that its server's database is elsewhere, if it is, for `refuse_to_forget`."""
    if database and not (folder / DATABASE_FILE).exists():
        place = shown(make_url(database))
        if not (folder / NOTE).exists() or (folder / NOTE).read_bytes() != f"{place}\n".encode():
            durable.write(folder / NOTE, f"{place}\n".encode())


def sqlite_file(url: str) -> Path | None:
    """Returns the file of a SQLite URL; None if it is of another database, or in memory.

    Raises:
        StateInvalid: If it is no URL of a database.
    """
    parsed = parse(url)
    path = parsed.database or ""
    if parsed.get_backend_name() != "sqlite":
        return None
    if "uri" in parsed.query and path.startswith("file:"):
        path = unquote(urlsplit(path).path)
    return Path(path) if path else None


def sole_use(url: str) -> AbstractContextManager[None]:
    """Holds the file of a SQLite database for this process; a PostgreSQL is not held, for several servers may share it.

    Raises:
        StateInvalid: If another server holds it, or its folder is missing or cannot be written; or if the URL is none.
    """
    file = sqlite_file(url)
    if file is None:
        return nullcontext()
    if not file.parent.is_dir():
        raise StateInvalid(f"--database: there is no folder {file.parent}; make it, or name another")
    cure = "name another with --database: only a PostgreSQL is shared"
    return locks.file(file, f"database {file}", "server", cure)


def _with_driver(url: URL) -> URL:
    """Names psycopg 3 for PostgreSQL, so that the meaning of a URL does not change with SQLAlchemy's defaults."""
    return url.set(drivername="postgresql+psycopg") if url.drivername in ("postgres", "postgresql") else url


def _engine(url: URL, timing: Timing) -> Engine:
    if url.get_backend_name() == "sqlite":
        return _sqlite(url, timing)
    return postgresql.engine(url, timing, idle_s=timing.database_idle_s)


def _sqlite(url: URL, timing: Timing) -> Engine:
    # One connection for the one thread that uses it; opening may happen in another.
    arguments = {"check_same_thread": False, "timeout": timing.database_busy_s}  # as PRAGMA busy_timeout
    engine = create_engine(url, poolclass=StaticPool, connect_args=arguments)

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver's own transactions leave out DDL and take the write lock late; `_begin` makes real ones.
        connection.isolation_level = None
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    event.listen(engine, "begin", _begin)
    return engine


def readers(engine: Engine, most: int, timing: Timing) -> Engine:
    """Returns an engine for at most so many transactions at once that only read, beside those of `engine`.

    All statements of one see the same state, and it can write nothing. It waits for no lock of SQLite's: that is the
    caller's.
    """
    if engine.dialect.name != "sqlite":
        read_only = {"postgresql_readonly": True}
        return postgresql.engine(
            engine.url,
            timing,
            idle_s=timing.database_lost_s,
            pool_size=most,
            isolation_level="REPEATABLE READ",
            execution_options=read_only,
        )
    made = create_engine(
        engine.url,
        poolclass=QueuePool,
        pool_size=most,
        connect_args={"check_same_thread": False, "timeout": 0},
        execution_options={_READS: True},
    )

    @event.listens_for(made, "connect")
    def _configure(connection: sqlite3.Connection, _record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA query_only = ON")

    event.listen(made, "begin", _begin)
    return made


def _begin(connection: Connection) -> None:
    # A transaction that only reads takes no lock that another program's writing could keep from it (WAL).
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get(_READS) else "BEGIN IMMEDIATE")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Makes a transaction that only reads."""
    with engine.connect().execution_options(**{_READS: True}) as connection, connection.begin():
        yield connection


def _check(engine: Engine, where: str) -> None:
    with reading(engine) as connection:
        if engine.dialect.name == "sqlite":
            fault = connection.execute(text("PRAGMA quick_check(1)")).scalar()
            if fault != "ok":
                raise StateInvalid(f"database {where} is corrupt ({fault}); restore it from a backup")
            files = [file for _, name, file in connection.execute(text("PRAGMA database_list")) if name == "main"]
            if connection.execute(text("PRAGMA journal_mode")).scalar() == "memory" or files == [""]:
                raise StateInvalid(f"--database: {where} is in memory, and lost with the process; name a file")
        else:
            postgresql.check_encoding(connection, where)


@contextmanager
def opening(engine: Engine, timing: Timing) -> Iterator[None]:
    """Disposes of an engine if the block, which makes the first use of it, fails.

    Raises:
        StateInvalid: If the database cannot be used until somebody mends it; no start is worth repeating until then.
        FedpeftError: As `translated`.
    """
    try:
        with translated(shown(engine.url), timing):
            yield
    except BaseException as error:
        engine.dispose()
        if isinstance(error, DatabaseUnavailable) and error.permanent:
            raise StateInvalid(error.message) from error
        raise


@contextmanager
def translated(where: str, timing: Timing) -> Iterator[None]:
    """Translates what a driver raises into this project's errors.

    Raises:
        DiskFull: If the database has no room to grow.
        DatabaseLocked: If another program holds a lock.
        DatabaseUnavailable: If it is corrupt, read-only or out of reach.
        StateInvalid: If a statement fails for another reason.
    """
    try:
        yield
    except FedpeftError:
        raise
    except (DBAPIError, sqlite3.Error) as error:
        raise _fault(error, where, timing) from error
    except SQLAlchemyError as error:
        raise StateInvalid(f"database {where} failed: {error}") from error


def _fault(error: DBAPIError | sqlite3.Error, where: str, timing: Timing) -> FedpeftError:
    cause: BaseException | None = error.orig if isinstance(error, DBAPIError) else error
    name = getattr(cause, "sqlite_errorname", "") or ""
    busy_s = timing.database_busy_s
    words, sqlstate = " ".join(str(cause).split()), getattr(cause, "sqlstate", "") or ""
    if sqlstate == postgresql.LOCKED:
        return DatabaseLocked(
            f"database {where} was locked by another session for {busy_s:g} s (another server that stands still, a "
            "shell?); end that one"
        )
    if sqlstate in postgresql.UNDONE:
        return DatabaseLocked(f"database {where} undid a transaction in favour of another session's ({words})")
    if cause is not None and not name and (fault := postgresql.fault(cause, sqlstate, words, timing.database_lost_s)):
        return _unavailable(f"database {where} {fault}", permanent=sqlstate in postgresql.CORRUPT)
    if name.startswith("SQLITE_FULL") or sqlstate == "53100":
        return DiskFull(f"database {where} has no room to grow ({errno.errorcode[errno.ENOSPC]}); free some disk space")
    if name in ("SQLITE_NOTADB", "SQLITE_CORRUPT") or name.startswith("SQLITE_CORRUPT_"):
        return _unavailable(f"database {where} is corrupt ({words}); restore it from a backup", permanent=True)
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return DatabaseLocked(
            f"database {where} has been locked by another program for {busy_s:g} s (a shell, a backup?); end its "
            "transaction"
        )
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return _unavailable(
            f"database {where} cannot be opened for writing ({words}); check its folder, its permissions, and whether "
            "the file system was mounted read-only",
            permanent=True,
        )
    if name.startswith("SQLITE_IOERR"):
        return _unavailable(
            f"database {where} cannot be read or written ({words}, {name}); check the disk, then start the server again"
        )
    return StateInvalid(f"database {where} failed: {words}")


def _unavailable(message: str, *, permanent: bool = False) -> DatabaseUnavailable:
    error = DatabaseUnavailable(message)
    error.permanent = permanent
    return error
