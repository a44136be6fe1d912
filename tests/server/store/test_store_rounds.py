"""Rounds, tickets and updates in the database."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from fedpeft.errors import RunNotFound, StateInvalid
from fedpeft.rounds.state_machine import Aggregated, Phase, Stopped, TicketState, Withdrawn, advance
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import ClientRow, Place, RoundFigures, RunState, TicketFigures, Traffic

from ..rows import CONFIG, RUN, after_receipt, opened, run_row, shown, update_row, version_row


class TestRounds:
    def test_a_round_comes_back_as_it_was(self, with_run: Database) -> None:
        assert with_run.current_round(RUN) is None
        state = opened()
        state = advance(state, Withdrawn(state.tickets[1].id, "näh"), CONFIG.rounds, 1001.0)[0]
        with_run.save_round(state)
        row = with_run.current_round(RUN)
        assert row is not None and row.round == state and row.updates == {}
        (figures,) = shown(with_run)
        assert figures == RoundFigures(state, tickets=tuple(TicketFigures(t, Traffic()) for t in state.tickets))
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
        second.receive(received, [update_row(state.tickets[0].id)])
        row = second.current_round(RUN)
        assert row is not None and row.round == received
        second.close()

    def test_an_update_is_written_with_its_round_and_counts_once(self, with_run: Database) -> None:
        state = opened()
        client, ticket = state.tickets[0].client, state.tickets[0].id
        with_run.see_clients([ClientRow(client, "0" * 32, "trainer", b"", 1.0, 1.0)])
        state = after_receipt(state)
        with_run.receive(state, [update_row(ticket)])
        with_run.receive(state, [update_row(ticket, at=99.0)])
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
            with_run.receive(state, [update_row(ticket)])
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
                {},
            )
        row = with_run.current_round(RUN)
        assert row is not None and row.round == done
        (figures,) = shown(with_run)
        assert (figures.committed_at, figures.record, figures.record_sha256) == (7.5, '{"r":1}', "e" * 64)
        assert {t.ticket.id: t.weight for t in figures.tickets} == weights
        assert figures.metrics == {"train_loss": 0.1}
        assert with_run.run(RUN) == run_row(version=1, reason="going on")
        assert with_run.version(RUN, 1) == version_row(1)
        with_run.save_round(opened(2))
        assert [with_run.record_sha256(RUN, number) for number in (0, 1, 2)] == ["", "e" * 64, ""]
        assert [r.round.number for r in shown(with_run)] == [1, 2]
        assert [r.round.number for r in shown(with_run, Place(1))] == [2]
        assert shown(with_run)[0] == figures

    def test_a_failed_commit_leaves_nothing(self, with_run: Database) -> None:
        state = opened()
        with_run.save_round(state)
        stray = replace(after_receipt(state), run="run-x")
        arguments = (7.5, {}, version_row(1), "{}", "e" * 64, {}, RunState.RUNNING, "", {})
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
            with_run.receive(received, [replace(broken, metrics={"loss": object()})])
        with_run.receive(received, [broken])
        row = with_run.current_round(RUN)
        assert row is not None and row.round == received


def test_a_receipt_writes_the_tickets_that_changed_and_no_others(sqlite_url: str) -> None:
    database = Database.open(sqlite_url)
    database.create_run(run_row(), version_row(0))
    state = opened(clients=3000)
    database.save_round(state)
    raw = database.transactions.engine.raw_connection().driver_connection
    assert isinstance(raw, sqlite3.Connection)
    before = raw.total_changes
    database.receive(after_receipt(state), [update_row(state.tickets[0].id)])
    assert raw.total_changes - before == 3, "the ticket, the update, and the bytes of its client"
    database.close()


CRASHING = """
import sys
from fedpeft.config import RoundsConfig
from fedpeft.adapters.payload import Manifest
from fedpeft.rounds.state_machine import Received, Round, Waiting, advance
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import ClientRow
from fedpeft_server.store.rows import Place, RoundFigures, TicketFigures, Traffic, UpdateRow
database, config = Database.open(sys.argv[1]), RoundsConfig(clients=400)
state, _ = advance(Round(sys.argv[2], 1), Waiting(frozenset(f"client-{i:03}" for i in range(400))), config, 1.0)
database.save_round(state)
for ticket in state.tickets:
    state, _ = advance(state, Received(ticket.id), config, 2.0)
    database.receive(state, [UpdateRow(ticket.id, 1, 1.0, {}, Manifest((), 0, bytes(32)), 2.0)])
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
