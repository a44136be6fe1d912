"""A database out of reach, read-only or corrupt: callers are told what it is, and it goes on once it is mended."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import Engine, create_engine, make_url, text
from structlog.testing import capture_logs

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft.v1.access_service_pb2 import ListAuditEntriesRequest
from fedpeft.v1.access_service_pb2_grpc import AccessServiceStub
from fedpeft_server.runs import aggregation
from fedpeft_server.store import connection
from fedpeft_server.store.database import Database
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, StartDaemon, config, fault, filled

SERVING = health_pb2.HealthCheckResponse.SERVING


pytestmark = pytest.mark.timed(database_check_s=0.05, fold_retry_s=0.05)


class PostgreSQL:
    """A database of the PostgreSQL of the tests, reached by a socket of its own and as a user of its own."""

    def __init__(self, url: str, folder: Path, admin: Engine) -> None:
        real = make_url(url)
        self.name = str(real.database)
        self._socket = folder / ".s.PGSQL.5432"
        self._real = Path(str(real.query["host"])) / ".s.PGSQL.5432"
        self._admin = admin
        self._socket.symlink_to(self._real)
        self.url = f"postgresql://{self.name}@/{self.name}?host={folder}"
        self.run(f"CREATE ROLE {self.name} LOGIN", f"ALTER DATABASE {self.name} OWNER TO {self.name}")

    def run(self, *statements: str) -> None:
        with self._admin.connect() as admin:
            for each in statements:
                admin.execute(text(each))

    def end_connections(self) -> None:
        self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{self.name}'")

    def refuse(self) -> None:
        self._socket.unlink()
        self.end_connections()

    def copy(self) -> None:
        """Keeps the database as it is, as a standby that gets nothing more."""
        self.end_connections()
        self.run(f"CREATE DATABASE {self.name}_copy TEMPLATE {self.name} OWNER {self.name}")

    def fail_over(self) -> None:
        """Puts the copy in the place of the database."""
        self.refuse()
        self.run(f"ALTER DATABASE {self.name} RENAME TO {self.name}_before")
        self.run(f"ALTER DATABASE {self.name}_copy RENAME TO {self.name}")
        self.mend()

    def crowd(self) -> None:
        self.run(f"ALTER DATABASE {self.name} CONNECTION LIMIT 0")
        self.end_connections()

    def stand_by(self) -> None:
        self.run(f"ALTER DATABASE {self.name} SET default_transaction_read_only = on")
        self.end_connections()

    def mend(self) -> None:
        if not self._socket.is_symlink():
            self._socket.symlink_to(self._real)
        self.run(
            f"ALTER DATABASE {self.name} CONNECTION LIMIT -1",
            f"ALTER DATABASE {self.name} RESET default_transaction_read_only",
        )


@pytest.fixture
def postgresql(postgresql_url: str, postgres: Path, tmp_path: Path) -> Iterator[PostgreSQL]:
    admin = create_engine(f"postgresql+psycopg://postgres@/postgres?host={postgres}", isolation_level="AUTOCOMMIT")
    folder = tmp_path / "socket"
    folder.mkdir()
    yield PostgreSQL(postgresql_url, folder, admin)
    admin.dispose()


async def unavailable(daemon: Daemon, *calls: Any) -> str:
    """Returns why calls of clients are answered with DATABASE_UNAVAILABLE, as an operator is told."""
    for call in (*calls, daemon.client("b").register()):
        assert (await fault(call)).message == DatabaseUnavailable.for_sites
    error = await fault(daemon.create(request_id="another"))
    assert isinstance(error, DatabaseUnavailable)
    return error.message


async def until_health(daemon: Daemon, *, well: bool) -> None:
    stub = health_pb2_grpc.HealthStub(daemon.channel)
    async with asyncio.timeout(20):
        while ((await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING) is not well:
            await asyncio.sleep(0.02)


FAULTS: dict[str, tuple[Callable[[PostgreSQL], None], str]] = {
    "refused": (PostgreSQL.refuse, "cannot be reached .*; start it"),
    "too many connections": (PostgreSQL.crowd, "(takes no more connections|cannot be reached) .*too many connections"),
    "a standby": (PostgreSQL.stand_by, "takes nothing written .*read-only transaction.*Name the primary"),
}


@pytest.mark.parametrize(("break_it", "sentence"), FAULTS.values(), ids=FAULTS)
async def test_postgresql_that_fails_is_said_and_waited_for(
    start: StartDaemon, postgresql: PostgreSQL, break_it: Callable[[PostgreSQL], None], sentence: str
) -> None:
    daemon = await start(database=postgresql.url)
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    break_it(postgresql)
    assert re.search(sentence, await unavailable(daemon, a.push(task.ticket, filled(1.0))))
    await until_health(daemon, well=False)
    postgresql.mend()
    await until_health(daemon, well=True)
    receipt = await a.push(task.ticket, filled(1.0))
    assert receipt.ticket == task.ticket
    await daemon.until(run.id, lambda r: r.version == 1)


async def test_runs_that_a_standby_has_an_older_state_of_are_paused_and_the_server_ends(
    start: StartDaemon, postgresql: PostgreSQL, tmp_path: Path
) -> None:
    """Its versions of the newer database would be served with what is made of the older one."""
    daemon = await start(tmp_path / "data", database=postgresql.url)
    run = (await daemon.create(config(rounds={"count": 4, "clients": 1}))).id
    over = (await daemon.create(config(rounds={"count": 1, "clients": 1}), request_id="over")).id
    (a,) = await daemon.clients("a")
    await a.push((await a.task(run)).ticket, filled(1.0))
    await daemon.until(run, lambda r: r.version == 1)
    postgresql.copy()
    await until_health(daemon, well=True)
    await a.push((await a.task(run)).ticket, filled(2.0))
    await daemon.until(run, lambda r: r.version == 2)
    await a.pull(run, 2)
    await daemon.operator.StopRun(op.StopRunRequest(run=over))
    with capture_logs() as lines:
        postgresql.fail_over()
        async with asyncio.timeout(20):
            await daemon.server.stopping.wait()
    said = [line["message"] for line in lines if line["event"] == "the server shuts down"]
    assert len(said) == 1 and (run in said[0] or over in said[0])
    with pytest.raises(DatabaseUnavailable, match=r"older than it was, .* start it again"):
        await daemon.end()
    daemon = await start(tmp_path / "data", database=postgresql.url)
    paused = await daemon.run(run)
    assert (paused.version, paused.state) == (1, run_pb2.RUN_STATE_PAUSED)
    assert re.search("it had version 2 .* has version 1 at", paused.reason), paused.reason
    audit = await AccessServiceStub(daemon.channel).ListAuditEntries(ListAuditEntriesRequest())
    assert [paused.reason in each.details for each in audit.entries if each.object == run][-1]
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
    (a,) = await daemon.clients("a")
    await a.push((await a.task(run)).ticket, filled(7.0))
    await daemon.until(run, lambda r: r.version == 2)
    assert (await daemon.adapter(run, 2))["head.weight"].flat[0] == 8.0


async def test_ended_connections_are_replaced(start: StartDaemon, postgresql: PostgreSQL) -> None:
    daemon = await start(database=postgresql.url)
    postgresql.end_connections()
    await daemon.clients("a")
    listed = await daemon.operator.ListClients(op.ListClientsRequest())
    assert [client.id for client in listed.clients] == ["a"]


async def test_a_round_is_folded_once_the_database_is_back(
    start: StartDaemon, postgresql: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds: list[int] = []
    fold = aggregation.aggregate

    def broken(*args: Any) -> Any:
        result = fold(*args)
        if not folds:
            postgresql.refuse()
        folds.append(1)
        return result

    daemon = await start(database=postgresql.url)
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    monkeypatch.setattr(aggregation, "aggregate", broken)
    await a.push(task.ticket, filled(1.0))
    await until_health(daemon, well=False)
    postgresql.mend()
    await until_health(daemon, well=True)
    done = await daemon.until(run.id, lambda r: r.version == 1)
    assert len(folds) == 2 and not done.reason


def test_a_start_without_postgresql_says_what_to_do(postgresql: PostgreSQL) -> None:
    postgresql.refuse()
    with pytest.raises(DatabaseUnavailable, match=r"cannot be reached .*; start it"):
        Database.open(postgresql.url, TIMING)


@pytest.mark.parametrize(
    ("sqlstate", "sentence"),
    [
        ("57014", "did not answer"),
        ("25006", "takes nothing written"),
        ("57P01", "cannot be reached"),
        ("57P03", "cannot be reached"),
        ("08006", "cannot be reached"),
        ("53300", "takes no more connections"),
        ("58030", "its disk fails"),
        ("XX001", "is corrupt"),
    ],
)
def test_every_state_in_which_postgresql_cannot_be_used_has_a_sentence(sqlstate: str, sentence: str) -> None:
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    from sqlalchemy.exc import OperationalError

    cause = psycopg.errors.lookup(sqlstate)("words") if sqlstate != "08006" else psycopg.errors.ConnectionFailure("w")
    with pytest.raises(DatabaseUnavailable, match=sentence), connection.translated("x", TIMING):
        raise OperationalError("SELECT 1", {}, cause)


@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
def test_a_transaction_that_postgresql_undid_for_another_one_is_made_again(sqlstate: str) -> None:
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed")
    from sqlalchemy.exc import OperationalError

    with pytest.raises(DatabaseLocked, match="undid a transaction"), connection.translated("x", TIMING):
        raise OperationalError("SELECT 1", {}, psycopg.errors.lookup(sqlstate)("words"))


def read_only(daemon: Daemon) -> None:
    with daemon.server.store.db.transactions.engine.connect() as sqlite:
        sqlite.exec_driver_sql("PRAGMA query_only = ON")


def corrupt(daemon: Daemon) -> None:
    with daemon.server.store.db.transactions.engine.connect() as raw:
        sqlite = raw.connection.driver_connection
        assert sqlite is not None
        raw.rollback()
        sqlite.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        with (daemon.server.settings.data_dir / "fedpeft.db").open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(100)
            file.write(b"\xa5" * (size - 100))
        sqlite.execute("PRAGMA shrink_memory")


@pytest.mark.parametrize(
    ("break_it", "sentence"),
    [
        (read_only, "cannot be opened for writing .*readonly database.*mounted read-only"),
        (corrupt, "is corrupt .*; restore it from a backup"),
    ],
)
async def test_sqlite_that_fails_is_said(start: StartDaemon, break_it: Callable[[Daemon], None], sentence: str) -> None:
    daemon = await start()
    await daemon.clients("a")
    await daemon.server.store.transact(break_it, daemon)
    assert re.search(sentence, await unavailable(daemon))
    await until_health(daemon, well=False)
