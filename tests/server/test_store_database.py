"""The database, on SQLite and, where a server and a driver are installed, on PostgreSQL."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import create_engine, select, text

from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import DiskFull, RequestIdReused, RunNotFound, StateInvalid, TicketNotFound, VersionNotFound
from fedpeft.payload import Entry, Manifest
from fedpeft.rounds import Aggregated, Phase, Received, Round, Stopped, TicketState, Waiting, Withdrawn, advance
from fedpeft.spec import AdapterSpec, Role, TensorSpec
from fedpeft_server.store import tables
from fedpeft_server.store.connection import connect
from fedpeft_server.store.database import Database
from fedpeft_server.store.evaluations import merged
from fedpeft_server.store.rows import RunRow, RunState, Traffic, UpdateRow, VersionRow

RUN = "run-000000000001"
CONFIG: RunConfig = parse_config(
    {
        "name": "emoji",
        "model": {"name": "vit_tiny", "classes": ["a", "b"]},
        "peft": {"method": "lora", "rank": 8},
        "rounds": {"clients": 3, "quorum": 1},
        "simulation": {"clients": 9},
    }
)
SPEC = AdapterSpec.of(
    "lora", [TensorSpec("head.bias", (2,)), TensorSpec("lora.A", (8, 4), (Role.SENT, Role.FROZEN, Role.LOCAL))]
)
MANIFEST = Manifest(
    (Entry("head.bias", (2,), "float32", 0, 8), Entry("lora.A", (8, 4), "float32", 8, 128)), 136, b"d" * 32
)


def run_row(run: str = RUN, **changes: object) -> RunRow:
    row = RunRow(run, CONFIG, SPEC, "f" * 64, RunState.RUNNING, "", 0, 100.25, 85_000_000, f"request-{run}", "9" * 64)
    return replace(row, **changes)  # type: ignore[arg-type]


def version_row(version: int, run: str = RUN) -> VersionRow:
    return VersionRow(run, version, f"{version:064}", 2**40 + version, "", 1.0 + version)


def update_row(ticket: str, at: float = 5.5) -> UpdateRow:
    return UpdateRow(ticket, 10**9, 0.1 + 0.2, {"loss": 1 / 3}, MANIFEST, at)


def opened(number: int = 1, run: str = RUN, clients: int = 3) -> Round:
    names = frozenset(f"client-{i:05}" for i in range(clients))
    rounds = CONFIG.rounds.model_copy(update={"clients": clients})
    return advance(Round(run, number), Waiting(names), rounds, 1000.125)[0]


def after_receipt(state: Round, position: int = 0) -> Round:
    return advance(state, Received(state.tickets[position].id), CONFIG.rounds, 1001.0)[0]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    """Starts a PostgreSQL of its own; gives the folder of its socket."""
    for program in ("initdb", "pg_ctl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} of PostgreSQL is not installed")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    root = os.geteuid() == 0
    try:
        user = pwd.getpwnam("postgres") if root else pwd.getpwuid(os.geteuid())
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="fedpeft-postgres-"))
    os.chown(folder, user.pw_uid, user.pw_gid)

    def call(*command: str) -> None:
        subprocess.run(
            command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60, user=user.pw_uid if root else None
        )

    try:
        call("initdb", "-D", "data", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        call("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")
        yield folder
        call("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'server.db'}"
    folder = request.getfixturevalue("postgres")
    name = f"test_{time.monotonic_ns()}"
    admin = create_engine(f"postgresql+psycopg://postgres@/postgres?host={folder}", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    admin.dispose()
    return f"postgresql://postgres@/{name}?host={folder}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database.open(url)
    yield database
    database.close()


@pytest.fixture
def with_run(database: Database) -> Database:
    database.create_run(run_row(), version_row(0))
    return database


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'server.db'}"


class TestSchema:
    def test_the_migrations_make_the_tables_of_the_code(self, url: str) -> None:
        Database.open(url).close()
        engine = connect(url)
        with engine.begin() as connection:
            assert compare_metadata(MigrationContext.configure(connection), tables.metadata) == []
        engine.dispose()

    def test_opening_again_changes_nothing(self, url: str) -> None:
        for _ in range(2):
            database = Database.open(url)
            if not database.runs():
                database.create_run(run_row(), version_row(0))
            assert [r.id for r in database.runs()] == [RUN]
            database.close()

    def test_a_newer_schema_asks_for_a_newer_server(self, url: str) -> None:
        Database.open(url).close()
        engine = connect(url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        engine.dispose()
        with pytest.raises(StateInvalid, match=r"schema 9999.*upgrade the server"):
            Database.open(url)

    def test_sqlite_loses_nothing_and_keeps_references(self, sqlite_url: str) -> None:
        engine = connect(sqlite_url)
        with engine.connect() as connection:
            pragmas = [
                connection.execute(text(f"PRAGMA {p}")).scalar()
                for p in ("journal_mode", "synchronous", "foreign_keys")
            ]
        engine.dispose()
        assert pragmas == ["wal", 2, 1]


class TestRuns:
    def test_a_run_comes_back_as_it_was(self, with_run: Database) -> None:
        assert with_run.run(RUN) == run_row()
        assert with_run.run_by_request(f"request-{RUN}") == run_row()
        assert with_run.run_by_request("another") is None
        assert with_run.version(RUN, 0) == version_row(0)

    def test_what_is_missing_is_said(self, with_run: Database) -> None:
        with pytest.raises(RunNotFound, match="run-x"):
            with_run.run("run-x")
        with pytest.raises(RunNotFound):
            with_run.set_run_state("run-x", RunState.PAUSED, "")
        with pytest.raises(RunNotFound):
            with_run.delete_run("run-x")
        with pytest.raises(RunNotFound):
            with_run.version("run-x", 0)
        with pytest.raises(RunNotFound):
            with_run.save_round(opened(run="run-x"))
        with pytest.raises(VersionNotFound, match="version 7"):
            with_run.version(RUN, 7)
        with pytest.raises(TicketNotFound, match="ticket-x"):
            with_run.ticket("ticket-x")

    def test_a_request_makes_one_run_and_runs_without_one_are_as_many_as_wanted(self, with_run: Database) -> None:
        with pytest.raises(RequestIdReused):
            with_run.create_run(run_row("run-2", request_id=f"request-{RUN}"), version_row(0, "run-2"))
        with pytest.raises(RunNotFound):
            with_run.run("run-2")
        for name in ("run-3", "run-4"):
            with_run.create_run(run_row(name, request_id="", created_at=1.0), version_row(0, name))
        assert [r.id for r in with_run.runs()] == ["run-3", "run-4", RUN]
        assert with_run.run("run-3").request_id == ""

    def test_its_state_changes_with_a_reason(self, with_run: Database) -> None:
        with_run.set_run_state(RUN, RunState.PAUSED, "asked to")
        assert with_run.run(RUN) == run_row(state=RunState.PAUSED, reason="asked to")

    def test_deleting_takes_everything_of_it_and_nothing_of_others(self, with_run: Database) -> None:
        with_run.create_run(run_row("run-2"), version_row(0, "run-2"))
        for run in (RUN, "run-2"):
            state = opened(run=run)
            with_run.receive(after_receipt(state), update_row(state.tickets[0].id))
            with_run.add_traffic({(run, 1, "client-00000"): Traffic(1, 2, 3, 4)})
            with_run.put_evaluation(run, 0, "judge", "test", {"accuracy": 0.5}, 1.0)
        with_run.delete_run(RUN)
        assert [r.id for r in with_run.runs()] == ["run-2"]
        with with_run._engine.connect() as connection:
            for table in (tables.versions, tables.rounds, tables.tickets, tables.traffic, tables.evaluations):
                assert set(connection.execute(select(table.c.run)).scalars()) == {"run-2"}
            assert len(connection.execute(select(tables.updates)).all()) == 1
        with_run.create_run(run_row(), version_row(0))
        assert with_run.current_round(RUN) is None
        with_run.save_round(opened())


class TestRounds:
    def test_a_round_comes_back_as_it_was(self, with_run: Database) -> None:
        assert with_run.current_round(RUN) is None
        state = opened()
        state = advance(state, Withdrawn(state.tickets[1].id, "näh"), CONFIG.rounds, 1001.0)[0]
        with_run.save_round(state)
        row = with_run.current_round(RUN)
        assert row is not None and row.round == state
        assert (row.committed_at, row.weights, row.updates, row.traffic, row.record, row.metrics) == (
            None,
            {},
            {},
            {},
            "",
            {},
        )
        found = with_run.ticket(state.tickets[1].id)
        assert (found.run, found.number, found.ticket) == (RUN, 1, state.tickets[1])

    def test_a_stopped_round_is_still_stopped_when_read_again(self, with_run: Database) -> None:
        state = advance(opened(), Stopped(), CONFIG.rounds, 1001.0)[0]
        with_run.save_round_and_run(state, RunState.STOPPED, "enough")
        row = with_run.current_round(RUN)
        assert row is not None and row.round == state and row.round.stopped
        assert with_run.run(RUN).state is RunState.STOPPED

    def test_what_another_process_wrote_before_is_seen(self, url: str) -> None:
        first = Database.open(url)
        first.create_run(run_row(), version_row(0))
        state = opened()
        first.save_round(state)
        first.close()
        second = Database.open(url)
        received = after_receipt(state)
        second.receive(received, update_row(state.tickets[0].id))
        row = second.current_round(RUN)
        assert row is not None and row.round == received
        second.close()

    def test_an_update_is_written_with_its_round_and_counts_once(self, with_run: Database) -> None:
        state = opened()
        client, ticket = state.tickets[0].client, state.tickets[0].id
        with_run.see_client(client, "0" * 32, "trainer", b"", 1.0)
        state = after_receipt(state)
        with_run.receive(state, update_row(ticket))
        with_run.receive(state, update_row(ticket, at=99.0))
        row = with_run.current_round(RUN)
        assert row is not None
        assert row.updates == {ticket: update_row(ticket)}
        assert row.round.ticket(ticket).state is TicketState.RECEIVED
        found = with_run.client(client)
        assert found is not None and found.updates == 1

    def test_a_commit_writes_round_version_and_run_together(self, with_run: Database) -> None:
        state = opened()
        for position in range(3):
            ticket = state.tickets[position].id
            state = after_receipt(state, position)
            with_run.receive(state, update_row(ticket))
        assert state.phase is Phase.AGGREGATING
        weights = {t.id: 1 / 3 for t in state.tickets}
        done = advance(state, Aggregated(), CONFIG.rounds, 1002.0)[0]
        for _ in range(2):  # the second as after an answer that was lost
            with_run.commit_round(
                done,
                7.5,
                weights,
                version_row(1),
                '{"r":1}',
                "e" * 64,
                {"train_loss": 0.1},
                RunState.RUNNING,
                "going on",
            )
        row = with_run.current_round(RUN)
        assert row is not None and row.round == done
        assert (row.committed_at, row.weights, row.record, row.record_sha256) == (7.5, weights, '{"r":1}', "e" * 64)
        assert row.metrics == {"train_loss": 0.1}
        assert with_run.run(RUN) == run_row(version=1, reason="going on")
        assert with_run.version(RUN, 1) == version_row(1)
        with_run.save_round(opened(2))
        assert with_run.last_record_sha256(RUN) == "e" * 64
        assert with_run.last_record_sha256("run-x") == ""
        assert [r.round.number for r in with_run.rounds(RUN)] == [1, 2]
        assert [r.round.number for r in with_run.rounds(RUN, after=1)] == [2]
        assert with_run.rounds(RUN)[0] == row

    def test_a_failed_commit_leaves_nothing(self, with_run: Database) -> None:
        state = opened()
        with_run.save_round(state)
        stray = replace(after_receipt(state), run="run-x")
        arguments = (7.5, {}, version_row(1), "{}", "e" * 64, {}, RunState.RUNNING, "")
        with pytest.raises(RunNotFound):
            with_run.commit_round(stray, *arguments)
        row = with_run.current_round(RUN)
        assert row is not None and row.round == state
        assert with_run.run(RUN).version == 0

    def test_a_failure_does_not_hide_what_must_be_written_the_next_time(self, with_run: Database) -> None:
        state = opened()
        received = after_receipt(state)
        with_run.save_round(state)
        broken = update_row(state.tickets[0].id)
        with pytest.raises((StateInvalid, TypeError)):
            with_run.receive(received, replace(broken, metrics={"loss": object()}))
        with_run.receive(received, broken)
        row = with_run.current_round(RUN)
        assert row is not None and row.round == received


class TestFigures:
    def test_traffic_adds_up(self, with_run: Database) -> None:
        with_run.save_round(opened())
        with_run.add_traffic({})
        for _ in range(3):
            with_run.add_traffic(
                {
                    (RUN, 1, "a"): Traffic(1, 2, 3, 2**40),
                    (RUN, 1, "b"): Traffic(5),
                    (RUN, 2, "a"): Traffic(7),
                    ("run-deleted", 1, "a"): Traffic(9),
                }
            )
        row = with_run.current_round(RUN)
        assert row is not None
        assert row.traffic == {"a": Traffic(3, 6, 9, 3 * 2**40), "b": Traffic(15)}
        assert Traffic(1, 2, 3, 4) + Traffic(4, 3, 2, 1) == Traffic(5, 5, 5, 5)

    def test_an_evaluation_replaces_the_one_before(self, with_run: Database) -> None:
        for accuracy, at in ((0.25, 1.0), (0.5, 2.0)):
            with_run.put_evaluation(RUN, 0, "judge", "test", {"accuracy": accuracy}, at)
        assert with_run.evaluations(RUN) == {0: {"accuracy": 0.5}}
        with_run.put_evaluation(RUN, 0, "judge", "validation", {"accuracy": 0.75}, 3.0)
        assert with_run.evaluations(RUN) == {0: {"accuracy": 0.75}}
        assert with_run.evaluated_by(RUN, "judge") == {0}
        assert with_run.evaluated_by(RUN, "nobody") == set()

    def test_several_evaluators_are_weighed_by_their_examples(self, with_run: Database) -> None:
        with_run.put_evaluation(RUN, 0, "a", "test", {"accuracy": 0.0, "examples": 100.0}, 1.0)
        with_run.put_evaluation(RUN, 0, "b", "test", {"accuracy": 1.0, "examples": 300.0, "loss": 2.0}, 1.0)
        assert with_run.evaluations(RUN) == {0: {"accuracy": 0.75, "examples": 400.0, "loss": 2.0}}

    def test_only_versions_that_exist_are_evaluated(self, with_run: Database) -> None:
        with pytest.raises(VersionNotFound):
            with_run.put_evaluation(RUN, 3, "judge", "test", {}, 1.0)
        with pytest.raises(RunNotFound):
            with_run.put_evaluation("run-x", 0, "judge", "test", {}, 1.0)

    @given(st.lists(st.dictionaries(st.sampled_from(["examples", "loss", "accuracy"]), st.floats(0, 1e6)), min_size=1))
    def test_a_mean_lies_between_its_values(self, figures: list[dict[str, float]]) -> None:
        result = merged(figures)
        assert set(result) == {name for f in figures for name in f}
        for name in set(result) - {"examples"}:
            values = [f[name] for f in figures if name in f]
            assert min(values) * (1 - 1e-9) <= result[name] <= max(values) * (1 + 1e-9)


class TestClients:
    def test_registering_again_keeps_when_it_was_first_seen(self, database: Database) -> None:
        assert database.client("b") is None
        database.see_client("b", "0" * 32, "trainer", b"\x00\xff", 1.0)
        database.see_client("a", "1" * 32, "evaluator", b"", 2.0)
        database.see_client("b", "2" * 32, "trainer", b"\x01", 3.0)
        database.touch_clients({"a": 9.0, "stranger": 9.0})
        database.touch_clients({})
        first, second = database.clients()
        assert (first.id, first.role, first.last_seen) == ("a", "evaluator", 9.0)
        assert (second.id, second.instance, second.capabilities) == ("b", "2" * 32, b"\x01")
        assert (second.first_seen, second.last_seen, second.updates) == (1.0, 3.0, 0)
        assert database.client("b") == second


class TestFaults:
    @pytest.mark.parametrize("url", ["nonsense", "oracle+thin://x/y", "mysql://x/y"])
    def test_a_url_that_is_none(self, url: str) -> None:
        with pytest.raises(StateInvalid):
            Database.open(url)

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(StateInvalid, match="cannot be opened"):
            Database.open(f"sqlite:///{tmp_path / 'missing' / 'server.db'}")

    def test_a_file_that_is_no_database(self, tmp_path: Path, sqlite_url: str) -> None:
        (tmp_path / "server.db").write_bytes(b"this is a letter to my aunt" * 1000)
        with pytest.raises(StateInvalid, match="corrupt"):
            Database.open(sqlite_url)

    def test_a_database_with_overwritten_pages(self, tmp_path: Path, sqlite_url: str) -> None:
        database = Database.open(sqlite_url)
        database.create_run(run_row(), version_row(0))
        database.save_round(opened(clients=500))
        database.close()
        with (tmp_path / "server.db").open("r+b") as file:
            file.seek(8 * 4096)
            file.write(b"\xa5" * 4096 * 20)
        with pytest.raises(StateInvalid, match="corrupt"):
            Database.open(sqlite_url)

    def test_a_full_disk(self, sqlite_url: str) -> None:
        database = Database.open(sqlite_url)
        database.create_run(run_row(), version_row(0))
        with database._engine.connect() as connection:
            connection.execute(text("PRAGMA max_page_count = 1"))
            connection.rollback()
        with pytest.raises(DiskFull, match="no room"):
            database.save_round(opened(clients=2000))
        with database._engine.connect() as connection:
            connection.execute(text("PRAGMA max_page_count = 100000"))
            connection.rollback()
        database.save_round(opened(clients=2000))
        database.close()

    def test_a_lock_held_elsewhere(self, tmp_path: Path, sqlite_url: str) -> None:
        database = Database.open(sqlite_url)
        with database._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 50")
            connection.rollback()
        other = sqlite3.connect(tmp_path / "server.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateInvalid, match="locked"):
            database.create_run(run_row(), version_row(0))
        other.execute("ROLLBACK")
        other.close()
        database.create_run(run_row(), version_row(0))
        database.close()

    def test_a_postgresql_that_does_not_answer(self, tmp_path: Path) -> None:
        pytest.importorskip("psycopg", reason="psycopg is not installed")
        with pytest.raises(StateInvalid, match="postgresql"):
            Database.open(f"postgresql://postgres@/nothing?host={tmp_path}")


def test_a_receipt_writes_the_tickets_that_changed_and_no_others(sqlite_url: str) -> None:
    database = Database.open(sqlite_url)
    database.create_run(run_row(), version_row(0))
    state = opened(clients=3000)
    database.save_round(state)
    raw = database._engine.raw_connection().driver_connection
    assert isinstance(raw, sqlite3.Connection)
    before = raw.total_changes
    database.receive(after_receipt(state), update_row(state.tickets[0].id))
    assert raw.total_changes - before == 2
    database.close()


CRASHING = """
import sys
from fedpeft.config import RoundsConfig
from fedpeft.payload import Manifest
from fedpeft.rounds import Received, Round, Waiting, advance
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import UpdateRow
database, config = Database.open(sys.argv[1]), RoundsConfig(clients=400)
state, _ = advance(Round(sys.argv[2], 1), Waiting(frozenset(f"client-{i:03}" for i in range(400))), config, 1.0)
database.save_round(state)
for ticket in state.tickets:
    state, _ = advance(state, Received(ticket.id), config, 2.0)
    database.receive(state, UpdateRow(ticket.id, 1, 1.0, {}, Manifest((), 0, bytes(32)), 2.0))
    print(ticket.id, flush=True)
"""


@pytest.mark.parametrize("receipts", [1, 40])
def test_killed_between_any_two_instructions_it_keeps_every_receipt(sqlite_url: str, receipts: int) -> None:
    database = Database.open(sqlite_url)
    database.create_run(run_row(), version_row(0))
    database.close()
    process = subprocess.Popen([sys.executable, "-c", CRASHING, sqlite_url, RUN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    receipted = [process.stdout.readline().strip() for _ in range(receipts)]
    process.send_signal(signal.SIGKILL)
    receipted += process.stdout.read().split("\n")[:-1]
    process.stdout.close()
    assert process.wait(10) == -signal.SIGKILL
    database = Database.open(sqlite_url)
    row = database.current_round(RUN)
    assert row is not None
    durable = {t.id for t in row.round.in_state(TicketState.RECEIVED)}
    assert durable == set(row.updates)
    assert set(receipted) <= durable
    assert len(durable) <= len(receipted) + 1
    database.close()
