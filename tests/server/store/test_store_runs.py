"""Runs and versions in the database."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from fedpeft.errors import RequestIdReused, RunNotFound, TicketNotFound, VersionNotFound
from fedpeft_server.store import tables
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import RunState, Traffic

from ..rows import RUN, after_receipt, opened, run_row, update_row, version_row, write


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
            with_run.delete_run("run-x")
        with pytest.raises(RunNotFound):
            with_run.version("run-x", 0)
        with pytest.raises(RunNotFound):
            write(with_run, opened(run="run-x"))
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
        write(with_run, opened(), state=RunState.PAUSED, reason="asked to")
        assert with_run.run(RUN) == run_row(state=RunState.PAUSED, reason="asked to", revision=1)

    def test_deleting_takes_everything_of_it_and_nothing_of_others(self, with_run: Database) -> None:
        with_run.create_run(run_row("run-2"), version_row(0, "run-2"))
        for run in (RUN, "run-2"):
            state = opened(run=run)
            write(with_run, after_receipt(state), update_row(state.tickets[0].id))
            with_run.add_traffic({(run, 1, "client-00000"): Traffic(1, 2, 3, 4)})
            with_run.put_evaluation(run, 0, "judge", "test", {"accuracy": 0.5}, 1.0)
        with_run.delete_run(RUN)
        assert [r.id for r in with_run.runs()] == ["run-2"]
        with with_run.transactions.engine.connect() as connection:
            for table in (tables.versions, tables.rounds, tables.tickets, tables.traffic, tables.evaluations):
                assert set(connection.execute(select(table.c.run)).scalars()) == {"run-2"}
            assert len(connection.execute(select(tables.updates)).all()) == 1
        with_run.create_run(run_row(), version_row(0))
        assert with_run.standings(RUN)[0][1].tickets == ()
        write(with_run, opened())
