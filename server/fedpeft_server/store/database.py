"""The database: every method is one transaction, and what it wrote is durable when it returns.

Synchronous, and called from one thread; the SQL is in `run_queries`, `round_queries` and `client_queries`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import Connection, Engine

from fedpeft.errors import RequestIdReused
from fedpeft.rounds import Round
from fedpeft_server.store import answer_queries, client_queries, round_queries, run_queries
from fedpeft_server.store.connection import closing_on_failure, connect, translated
from fedpeft_server.store.evaluations import merged
from fedpeft_server.store.migrations import migrate
from fedpeft_server.store.rows import (
    AnswerRow,
    ClientRow,
    RoundRow,
    RunRow,
    RunState,
    TicketRow,
    Traffic,
    UpdateRow,
    VersionRow,
)


class Database:
    """Runs, rounds, tickets, updates, versions, clients, traffic and evaluations.

    Any method may raise DiskFull if there is no room, or StateInvalid if the database is corrupt or out of reach; the
    transaction is then undone.

    Args:
        url_or_engine: A database URL, or an engine whose schema is the newest.
    """

    def __init__(self, url_or_engine: str | Engine) -> None:
        self._engine = connect(url_or_engine) if isinstance(url_or_engine, str) else url_or_engine
        self._where = self._engine.url.render_as_string(hide_password=True)
        # The round last written of each run: what need not be written again, so that a receipt costs one row of a
        # round's tickets and not all.
        self._written: dict[str, Round] = {}

    @classmethod
    def open(cls, url: str) -> Database:
        """Connects and brings the schema up to date.

        Raises:
            StateInvalid: If the URL is none, the database is corrupt or out of reach, or its schema is newer than
                this code.
        """
        engine = connect(url)
        with closing_on_failure(engine), translated(engine.url.render_as_string(hide_password=True)):
            migrate(engine)
        return cls(engine)

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with translated(self._where), self._engine.begin() as connection:
            yield connection

    # Runs and versions

    def create_run(self, run: RunRow, version: VersionRow) -> None:
        """Writes a new run with its version 0.

        Raises:
            RequestIdReused: If a run of the same `request_id` exists.
        """
        try:
            with self._transaction() as connection:
                if run.request_id and run_queries.select_run_by_request(connection, run.request_id):
                    raise RequestIdReused(f"request {run.request_id} already made a run")
                run_queries.insert_run(connection, run)
                run_queries.put_version(connection, version)
        finally:
            self._written.pop(run.id, None)

    def run_by_request(self, request_id: str) -> RunRow | None:
        """Returns the run that a CreateRun call made, or None."""
        with self._transaction() as connection:
            return run_queries.select_run_by_request(connection, request_id)

    def run(self, run_id: str) -> RunRow:
        """Returns a run.

        Raises:
            RunNotFound: If there is none of that id.
        """
        with self._transaction() as connection:
            return run_queries.select_run(connection, run_id)

    def runs(self) -> list[RunRow]:
        """Returns all runs, oldest first."""
        with self._transaction() as connection:
            return run_queries.select_runs(connection)

    def set_run_state(self, run_id: str, state: RunState, reason: str) -> None:
        """Sets the state of a run.

        Raises:
            RunNotFound: If there is none of that id.
        """
        with self._transaction() as connection:
            run_queries.update_run(connection, run_id, state, reason)

    def delete_run(self, run_id: str) -> None:
        """Deletes a run with its versions, rounds, tickets, updates, traffic and evaluations.

        Raises:
            RunNotFound: If there is none of that id.
        """
        self._written.pop(run_id, None)
        with self._transaction() as connection:
            run_queries.delete_run(connection, run_id)

    def version(self, run_id: str, version: int) -> VersionRow:
        """Returns a version of a run.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no such version.
        """
        with self._transaction() as connection:
            return run_queries.select_version(connection, run_id, version)

    # Rounds, tickets and updates

    def save_round(self, state: Round) -> None:
        """Writes a round and its tickets.

        Raises:
            RunNotFound: If its run does not exist.
        """
        with self._writing(state) as connection:
            round_queries.put_round(connection, state, self._before(state))

    def save_round_and_run(self, state: Round, run_state: RunState, reason: str) -> None:
        """Writes a round, its tickets, and the state of its run.

        Raises:
            RunNotFound: If its run does not exist.
        """
        with self._writing(state) as connection:
            round_queries.put_round(connection, state, self._before(state))
            run_queries.update_run(connection, state.run, run_state, reason)

    def receive(self, state: Round, update: UpdateRow) -> None:
        """Writes a round, its tickets, and what was received for one of them; a second update of a ticket is ignored.

        Raises:
            RunNotFound: If its run does not exist.
        """
        with self._writing(state) as connection:
            round_queries.put_round(connection, state, self._before(state))
            round_queries.put_update(connection, update)

    def commit_round(
        self,
        state: Round,
        committed_at: float,
        weights: Mapping[str, float],
        version: VersionRow,
        record: str,
        record_sha256: str,
        metrics: Mapping[str, float],
        run_state: RunState,
        reason: str,
    ) -> None:
        """Writes a committed round with its result, and the run's newest version and state.

        Args:
            state: The round, its phase COMMITTED.
            committed_at: When.
            weights: Share of each folded ticket in the mean.
            version: The result.
            record: Canonical JSON.
            record_sha256: Its digest, hexadecimal.
            metrics: Figures of the round.
            run_state: COMPLETED after the last round.
            reason: Why the run is in that state; may be empty.

        Raises:
            RunNotFound: If its run does not exist.
        """
        with self._writing(state) as connection:
            round_queries.put_round(connection, state, self._before(state))
            round_queries.put_result(connection, state, committed_at, weights, record, record_sha256, metrics)
            run_queries.put_version(connection, version)
            run_queries.update_run(connection, state.run, run_state, reason, version.version)

    def current_round(self, run_id: str) -> RoundRow | None:
        """Returns the round of the highest number, or None if there is none."""
        with self._transaction() as connection:
            newest = round_queries.newest_number(connection, run_id)
            return round_queries.select_rounds(connection, run_id, newest - 1)[0] if newest else None

    def rounds(self, run_id: str, after: int = 0) -> list[RoundRow]:
        """Returns the rounds of a run whose number is above `after`, oldest first."""
        with self._transaction() as connection:
            return round_queries.select_rounds(connection, run_id, after)

    def ticket(self, ticket_id: str) -> TicketRow:
        """Returns a ticket.

        Raises:
            TicketNotFound: If there is none of that id.
        """
        with self._transaction() as connection:
            return round_queries.select_ticket(connection, ticket_id)

    def update(self, ticket_id: str) -> UpdateRow | None:
        """Returns what was received for a ticket, or None."""
        with self._transaction() as connection:
            return round_queries.select_update(connection, ticket_id)

    def last_record_sha256(self, run_id: str) -> str:
        """Returns the digest of the newest record of a run, hexadecimal, or "" if no round was committed."""
        with self._transaction() as connection:
            return round_queries.last_record_sha256(connection, run_id)

    def _before(self, state: Round) -> Round | None:
        before = self._written.get(state.run)
        return before if before is not None and before.number == state.number else None

    @contextmanager
    def _writing(self, state: Round) -> Iterator[Connection]:
        """A transaction that writes a round; what it held before is unknown if it fails."""
        try:
            with self._transaction() as connection:
                yield connection
        except BaseException:
            self._written.pop(state.run, None)
            raise
        self._written[state.run] = state

    # Traffic and evaluations

    def add_traffic(self, deltas: Mapping[tuple[str, int, str], Traffic]) -> None:
        """Adds bytes by (run, round number, client); those of runs that do not exist are dropped."""
        with self._transaction() as connection:
            round_queries.add_traffic(connection, deltas)

    def put_evaluation(
        self, run: str, version: int, evaluator: str, split: str, metrics: Mapping[str, float], at: float
    ) -> None:
        """Writes what an evaluator found on a split for a version, in place of what it found before.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no such version.
        """
        with self._transaction() as connection:
            run_queries.select_version(connection, run, version)
            run_queries.put_evaluation(connection, run, version, evaluator, split, metrics, at)

    def evaluations(self, run_id: str) -> dict[int, dict[str, float]]:
        """Returns the figures of each scored version: the latest of each evaluator, merged."""
        with self._transaction() as connection:
            found = run_queries.select_evaluations(connection, run_id)
        return {version: merged(figures) for version, figures in found.items()}

    def evaluated_by(self, run_id: str, evaluator: str) -> set[int]:
        """Returns the versions that an evaluator scored."""
        with self._transaction() as connection:
            return run_queries.select_evaluated(connection, run_id, evaluator)

    # Clients and their answers

    def put_answer(self, answer: AnswerRow) -> None:
        """Writes what a client answered to the offer of a run, in place of what it answered before.

        Raises:
            RunNotFound: If there is no such run.
        """
        with self._transaction() as connection:
            run_queries.select_run(connection, answer.run)
            answer_queries.put_answer(connection, answer)

    def answers(self) -> list[AnswerRow]:
        """Returns what clients answered, of all runs."""
        with self._transaction() as connection:
            return answer_queries.select_answers(connection)

    def see_client(self, client: str, instance: str, role: str, capabilities: bytes, at: float) -> None:
        """Writes who a client is, as it registers."""
        with self._transaction() as connection:
            client_queries.put_client(connection, client, instance, role, capabilities, at)

    def touch_clients(self, seen: Mapping[str, float]) -> None:
        """Writes when clients were last seen."""
        with self._transaction() as connection:
            client_queries.touch(connection, seen)

    def client(self, client_id: str) -> ClientRow | None:
        """Returns a client, or None if it never registered."""
        with self._transaction() as connection:
            return client_queries.select_client(connection, client_id)

    def clients(self) -> list[ClientRow]:
        """Returns all clients by id."""
        with self._transaction() as connection:
            return client_queries.select_clients(connection)
