"""Retention in either database: states of versions, and which are there."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import insert, update

from fedpeft.errors import RunNotFound, VersionNotFound, VersionRemoved
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import tables
from fedpeft_server.store.database import Database
from fedpeft_server.store.queries.runs import insert_version
from fedpeft_server.store.retention import RetentionPolicy, Step
from fedpeft_server.store.rows import FileState
from fedpeft_server.timing import TIMING

from ..rows import RUN, opened, run_row, version_row, write


def made(database: Database, newest: int) -> Database:
    """Writes versions up to the newest."""
    with database.transactions.begin() as connection:
        for number in range(1, newest + 1):
            insert_version(connection, version_row(number))
        connection.execute(update(tables.runs).values(version=newest))
    return database


def states(database: Database) -> dict[FileState, list[int]]:
    found: dict[FileState, list[int]] = {}
    for number in range(10):
        found.setdefault(database.version(RUN, number).retention, []).append(number)
    return found


def test_a_version_is_decided_on_once_and_the_best_again(with_run: Database) -> None:
    made(with_run, 9)
    with_run.put_evaluation(RUN, 2, "judge", "test", {"loss": 0.3}, 1.0)
    with_run.put_evaluation(RUN, 4, "judge", "test", {"loss": 0.4}, 1.0)
    retention, policy = with_run.retention, RetentionPolicy(4, every=5)
    assert retention.decide(RUN, policy, "server") == Step((1, 3, 4))
    assert retention.decide(RUN, policy, "server") == Step()
    with_run.put_evaluation(RUN, 7, "judge", "test", {"loss": 0.2}, 1.0)
    assert retention.decide(RUN, RetentionPolicy(2, every=5), "server") == Step((2, 6))
    assert [row.version for row in retention.removing(RUN)] == [1, 2, 3, 4, 6]
    retention.removed(RUN, [1, 2])
    assert states(with_run) == {
        FileState.KEPT: [0, 5, 8, 9],
        FileState.HELD: [7],
        FileState.REMOVING: [3, 4, 6],
        FileState.REMOVED: [1, 2],
    }
    assert retention.runs_removing() == [RUN]
    assert sorted(retention.all_removed()) == [(RUN, number) for number in (1, 2, 3, 4, 6)]
    with pytest.raises(VersionRemoved, match="nearest to it are version 5 and version 7, and all from version 8 on"):
        retention.version(RUN, 6)
    with pytest.raises(VersionRemoved, match="nearest to it are version 0 and version 5, and all from version 8 on"):
        retention.version(RUN, 1)
    assert retention.version(RUN, 7) == with_run.version(RUN, 7)
    with pytest.raises(VersionNotFound):
        retention.version(RUN, 10)
    with pytest.raises(RunNotFound):
        retention.version("run-x", 0)
    assert retention.decide("run-x", policy, "server") == Step()
    with_run.delete_run(RUN)
    assert retention.all_removed() == []


def test_tickets_of_the_round_in_progress_hold_what_they_start_from(with_run: Database) -> None:
    made(with_run, 9)
    write(with_run, opened(10, clients=3))
    tickets = tables.tickets
    with with_run.transactions.begin() as connection:
        for client, number, state in ((0, 4, "issued"), (1, 6, "received"), (2, 7, "withdrawn")):
            connection.execute(
                insert(tables.rounds).values(run=RUN, number=number, phase="committed", extensions=0, stopped=False)
            )
            changed = update(tickets).where(tickets.c.client == f"client-{client:05}")
            connection.execute(changed.values(number=number, state=str(TicketState(state))))
    assert with_run.retention.decide(RUN, RetentionPolicy(2), "server") == Step((1, 2, 4, 6, 7))
    with with_run.transactions.begin() as connection:
        connection.execute(update(tickets).values(state=str(TicketState.WITHDRAWN)))
    assert with_run.retention.decide(RUN, RetentionPolicy(2), "server") == Step((3, 5))


def test_two_servers_decide_at_once_and_each_version_goes_once(url: str) -> None:
    databases = [Database.open(url, TIMING) for _ in range(2)]
    databases[0].create_run(run_row(), version_row(0))
    made(databases[0], 9)
    steps: list[Step] = []

    def decide(database: Database) -> None:
        for _ in range(3):
            steps.append(database.retention.decide(RUN, RetentionPolicy(2), "server"))

    threads = [threading.Thread(target=decide, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    removing = [version for step in steps for version in step.removing]
    assert sorted(removing) == [1, 2, 3, 4, 5, 6, 7]
    for database in databases:
        database.close()
