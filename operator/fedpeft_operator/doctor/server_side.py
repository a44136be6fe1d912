"""The server's side: its folder's lock, its database, its ports, its limits."""

from __future__ import annotations

import importlib.util
import resource
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from fedpeft.process import locks
from fedpeft.process.addresses import LAST_PORT, Address, check_database_url
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok, warning

FILES = 4096
"""Open files that a server with many clients needs."""


def check_limits(setup: Setup) -> Iterator[Finding]:
    """Looks at how many files a server may open: a connection is one."""
    if setup.data_dir is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES:
        yield warning("open files", f"at most {soft} (hard limit {hard})", f"ulimit -n {FILES}, or LimitNOFILE=")
    else:
        yield ok("open files", f"at most {soft}")


def check_database(setup: Setup) -> Iterator[Finding]:
    """Looks whether the database can be read, and which schema it has."""
    if setup.data_dir is None:
        return
    try:
        check_database_url(setup.database or "sqlite:///fedpeft.db")
    except ValueError as error:
        yield fault("database", f"--database: {error}", "correct --database, and that of the server")
        return
    if setup.database and not setup.database.startswith("sqlite"):
        yield _remote(setup.database)
        return
    path = Path(setup.database.removeprefix("sqlite:///")) if setup.database else setup.data_dir / "fedpeft.db"
    if not path.exists():
        yield ok("database", f"{path} is made at the first start")
        return
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=2) as database:
            (schema,) = database.execute("select version_num from alembic_version").fetchone()
        database.close()
    except (sqlite3.Error, TypeError) as error:
        yield fault("database", f"{path} cannot be read: {error}", "restore it from a backup")
        return
    yield _schema(f"{path} has schema {schema}", schema)


def _schema(said: str, schema: str) -> Finding:
    newest = newest_schema()
    if newest is None:
        return warning("database", f"{said}; the server is not installed here", 'pip install "fedpeft[server]"')
    if schema > newest:
        return fault("database", f"{said}, newer than {newest}, which this version knows", "install the newer version")
    if schema < newest:
        return ok("database", f"{said}; the server brings it to {newest} when it starts: back it up before")
    return ok("database", said)


def newest_schema() -> str | None:
    """Returns the newest schema of the installed server, read off the names of its migrations."""
    found = importlib.util.find_spec("fedpeft_server")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "store" / "migrations" / "versions"
    names = sorted(path.name.partition("_")[0] for path in folder.glob("[0-9]*.py"))
    return names[-1] if names else None


def _remote(url: str) -> Finding:
    if importlib.util.find_spec("psycopg") is None:
        return fault("database", "PostgreSQL needs psycopg", 'pip install "fedpeft[postgres]"')
    import psycopg

    scheme = url.partition(":")[0]  # postgresql+psycopg is SQLAlchemy's word
    try:
        with psycopg.connect(url.replace(scheme, "postgresql", 1), connect_timeout=3) as database:
            row = database.execute("select version_num from alembic_version").fetchone()
    except psycopg.errors.UndefinedTable:
        return ok("database", "PostgreSQL is reached; its tables are made at the first start")
    except psycopg.Error as error:
        reason = " ".join(str(error).split())  # psycopg names host and user, never the password
        return fault("database", f"PostgreSQL is not reached: {reason}", "check --database, the network and its rights")
    return _schema(f"PostgreSQL has schema {row[0] if row else 'none'}", row[0] if row else "")


def check_ports(setup: Setup) -> Iterator[Finding]:
    """Looks whether the ports of a server that is to start are free, or its own."""
    if setup.data_dir is None:
        return
    holder = locks.holder_of(setup.data_dir)
    if holder is not None:
        yield ok("process", f"a server runs on {setup.data_dir} (process {holder})")
    listen = Address.parse(setup.listen)
    wanted = [("--listen", listen)]
    if holder is None and (setup.data_dir / "identity" / "server.pem").exists():
        if listen.port == LAST_PORT:
            yield warning(
                "ports", f"--listen {listen} leaves no port after it, where devices enroll", "give --enroll one"
            )
        else:
            wanted.append(("--enroll", Address(listen.host, listen.port + 1)))
    if setup.metrics:
        wanted.append(("--metrics", Address.parse(setup.metrics)))
    for flag, address in wanted:
        yield _port(flag, address, running=holder is not None)


def _port(flag: str, address: Address, *, running: bool) -> Finding:
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family[0], family[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(family[4])
    except PermissionError:
        return fault("ports", f"{flag} {address}: this user may not listen there", "take a port above 1023")
    except OSError as error:
        if running:
            return ok("ports", f"{flag} {address} is in use, as it should be while the server runs")
        reason = error.strerror or str(error)
        return fault(
            "ports", f"{flag} {address}: {reason}", f"stop the process that has it (ss -ltnp), or give another {flag}"
        )
    if running:
        return warning("ports", f"{flag} {address} is free though a server runs here", f"say which {flag} it was given")
    return ok("ports", f"{flag} {address} is free")
