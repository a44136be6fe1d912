"""Rounds, tickets and updates in the database."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest

from fedpeft.errors import DatabaseLocked, StateInvalid
from fedpeft.rounds.events import Aggregated, Received, Stopped, Withdrawn
from fedpeft.rounds.state_machine import Phase, Round, advance
from fedpeft.rounds.tickets import TicketState
from fedpeft.rounds.transitions import RunStatus, transition
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import (
    ClientRow,
    Place,
    Result,
    RevisionMoved,
    RoundFigures,
    RunState,
    TicketFigures,
    Traffic,
    Transition,
    UpdateRow,
)
from fedpeft_server.timing import TIMING

from ..rows import CONFIG, RUN, after_receipt, opened, outcome, run_row, shown, update_row, version_row, write


class TestRounds:
    def test_a_round_comes_back_as_it_was(self, with_run: Database) -> None:
        assert in_database(with_run) == Round(RUN, 1)
        state = opened()
        state = advance(state, Withdrawn(state.tickets[1].id, "näh"), CONFIG.rounds, 1001.0)[0]
        write(with_run, state)
        assert in_database(with_run) == state and received_of(with_run) == {}
        (figures,) = shown(with_run)
        assert figures == RoundFigures(state, tickets=tuple(TicketFigures(t, Traffic()) for t in state.tickets))
        found = with_run.ticket(state.tickets[1].id)
        assert (found.run, found.ticket) == (RUN, state.tickets[1])

    def test_a_stopped_round_is_still_stopped_when_read_again(self, with_run: Database) -> None:
        state = advance(opened(), Stopped(), CONFIG.rounds, 1001.0)[0]
        write(with_run, state, state=RunState.STOPPED, reason="enough")
        assert in_database(with_run) == state and state.stopped
        assert with_run.run(RUN).state is RunState.STOPPED

    def test_what_another_process_wrote_before_is_seen(self, url: str) -> None:
        first = Database.open(url, TIMING)
        first.create_run(run_row(), version_row(0))
        state = opened()
        write(first, state)
        first.close()
        second = Database.open(url, TIMING)
        received = after_receipt(state)
        write(second, received, update_row(state.tickets[0].id))
        assert in_database(second) == received
        second.close()

    def test_an_update_is_written_with_its_round_and_counts_once(self, with_run: Database) -> None:
        state = opened()
        client, ticket = state.tickets[0].client, state.tickets[0].id
        with_run.see_clients([ClientRow(client, "0" * 32, "trainer", b"", 1.0, 1.0)])
        write(with_run, state)
        received = transition(status(with_run), [Received(ticket)], CONFIG.rounds, 1001.0)
        assert received is not None
        with_run.transit(Transition(received, [update_row(ticket)]))
        with pytest.raises(RevisionMoved, match="is at revision 2, not at 1"):
            with_run.transit(Transition(received, [update_row(ticket, at=99.0)]))
        assert received_of(with_run) == {ticket: update_row(ticket)}
        assert in_database(with_run).ticket(ticket).state is TicketState.RECEIVED
        found = with_run.client(client)
        assert found is not None and found.updates == 1

    def test_a_commit_writes_round_version_and_run_together(self, with_run: Database) -> None:
        state = opened()
        for position in range(3):
            ticket = state.tickets[position].id
            state = after_receipt(state, position)
            write(with_run, state, update_row(ticket))
        assert state.phase is Phase.AGGREGATING
        weights = {t.id: 1 / 3 for t in state.tickets}
        done = advance(state, Aggregated(), CONFIG.rounds, 1002.0)[0]
        result = Result(outcome('{"r":1}', weights, train_loss=0.1), 2.0, version_row(1))
        write(with_run, done, reason="going on", version=1, result=result)
        assert in_database(with_run) == Round(RUN, 2)
        (figures,) = shown(with_run)
        assert figures.round == done
        assert (figures.committed_at, figures.record, figures.record_sha256) == (2.0, '{"r":1}', "e" * 64)
        assert {t.ticket.id: t.weight for t in figures.tickets} == weights
        assert figures.metrics == {"train_loss": 0.1}
        assert with_run.run(RUN) == run_row(version=1, reason="going on", revision=4)
        assert with_run.version(RUN, 1) == version_row(1)
        write(with_run, opened(2))
        assert [with_run.record_sha256(RUN, number) for number in (0, 1, 2)] == ["", "e" * 64, ""]
        assert [r.round.number for r in shown(with_run)] == [1, 2]
        assert [r.round.number for r in shown(with_run, Place(1))] == [2]
        assert shown(with_run)[0] == figures

    def test_a_transition_that_fails_leaves_nothing(self, with_run: Database) -> None:
        state = opened()
        write(with_run, state)
        before = status(with_run)
        with pytest.raises((StateInvalid, DatabaseLocked)):  # there is a version 0, perhaps of another server
            write(with_run, after_receipt(state), version=1, result=Result(outcome(), 2.0, version_row(0)))
        assert status(with_run) == before and with_run.run(RUN).version == 0

    def test_a_failure_does_not_hide_what_must_be_written_the_next_time(self, with_run: Database) -> None:
        state = opened()
        received = after_receipt(state)
        write(with_run, state)
        broken = update_row(state.tickets[0].id)
        with pytest.raises((StateInvalid, TypeError)):
            write(with_run, received, replace(broken, metrics={"loss": object()}))
        write(with_run, received, broken)
        assert in_database(with_run) == received


def received_of(database: Database) -> Mapping[str, UpdateRow]:
    """Returns the updates of round 1, by ticket."""
    return database.fold_inputs(RUN, 1, 0, ()).updates


def status(database: Database) -> RunStatus:
    ((run, current),) = database.standings(RUN)
    return RunStatus(run.revision, run.state, run.reason, run.version, current)


def in_database(database: Database) -> Round:
    return status(database).round


def test_a_receipt_writes_the_tickets_that_changed_and_no_others(sqlite_url: str) -> None:
    database = Database.open(sqlite_url, TIMING)
    database.create_run(run_row(), version_row(0))
    state = opened(clients=3000)
    write(database, state)
    raw = database.transactions.engine.raw_connection().driver_connection
    assert isinstance(raw, sqlite3.Connection)
    before = raw.total_changes
    write(database, after_receipt(state), update_row(state.tickets[0].id))
    assert raw.total_changes - before == 4, "the run's revision, the ticket, the update, and the bytes of its client"
    database.close()


CRASHING = """
import sys
from fedpeft.config import RoundsConfig
from fedpeft.adapters.payload import Manifest
from fedpeft.rounds.events import Received, Waiting
from fedpeft.rounds.transitions import RunStatus, transition
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import Transition, UpdateRow
from fedpeft_server.timing import TIMING
database, config = Database.open(sys.argv[1], TIMING), RoundsConfig(clients=400)
((run, current),) = database.standings(sys.argv[2])
status = RunStatus(run.revision, run.state, run.reason, run.version, current)
made = transition(status, [Waiting(frozenset(f"client-{i:03}" for i in range(400)))], config, 1.0)
database.transit(Transition(made))
for ticket in made.round.tickets:
    made = transition(made.after, [Received(ticket.id)], config, 2.0)
    database.transit(Transition(made, [UpdateRow(ticket.id, 1, 1.0, {}, Manifest((), 0, bytes(32)), 2.0)]))
    print(ticket.id, flush=True)
"""


@pytest.mark.parametrize("receipts", [1, 40])
def test_killed_between_any_two_instructions_it_keeps_every_receipt(sqlite_url: str, receipts: int) -> None:
    database = Database.open(sqlite_url, TIMING)
    database.create_run(run_row(), version_row(0))
    database.close()
    process = subprocess.Popen([sys.executable, "-c", CRASHING, sqlite_url, RUN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    receipted = [process.stdout.readline().strip() for _ in range(receipts)]
    process.send_signal(signal.SIGKILL)
    receipted += process.stdout.read().split("\n")[:-1]
    process.stdout.close()
    assert process.wait(10) == -signal.SIGKILL
    database = Database.open(sqlite_url, TIMING)
    durable = {t.id for t in in_database(database).in_state(TicketState.RECEIVED)}
    assert durable == set(received_of(database))
    assert set(receipted) <= durable
    assert len(durable) <= len(receipted) + 1
    database.close()
