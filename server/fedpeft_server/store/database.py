"""The database: every method is one transaction, and what it wrote is durable when it returns.

Synchronous, and called from one thread; the SQL is in `store.queries`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import Engine

from fedpeft.errors import RequestIdReused
from fedpeft.rounds.conduct import Conduct
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.transitions import ACTIVE, in_progress
from fedpeft_server.store.connection import connect, opening
from fedpeft_server.store.evaluations import merged
from fedpeft_server.store.identities import Identities
from fedpeft_server.store.migrations import migrate
from fedpeft_server.store.notices.notices import Topic
from fedpeft_server.store.queries import (
    clients as client_queries,
)
from fedpeft_server.store.queries import (
    clock,
    evaluations,
    figures,
    leases,
    participation,
    past,
    rounds,
)
from fedpeft_server.store.queries import (
    runs as run_queries,
)
from fedpeft_server.store.queries.figures import Pending
from fedpeft_server.store.queries.past import Taken
from fedpeft_server.store.retention import VersionRetention
from fedpeft_server.store.rows import (
    AnswerRow,
    AuditEvent,
    ClientRow,
    FailedEvaluation,
    FoldInputs,
    GaugeSnapshot,
    Place,
    RoundFigures,
    RunRow,
    RunState,
    TicketRow,
    Traffic,
    Transition,
    UpdateRow,
    VersionRow,
)
from fedpeft_server.store.transactions import Transactions
from fedpeft_server.timing import Timing

Bytes = Mapping[tuple[str, int, str], Traffic]
"""Bytes since the last write, by (run, round number, client)."""
NONE: Bytes = MappingProxyType({})
AuditEvents = Sequence[AuditEvent]
"""Entries of a transaction in the audit log."""


class Database:
    """Runs, rounds, tickets, updates, versions, clients, traffic and evaluations.

    Any method may raise DiskFull if there is no room, DatabaseLocked if another program holds a lock, or
    DatabaseUnavailable if the database is corrupt or out of reach; the transaction is then undone.

    Args:
        url_or_engine: A database URL, or an engine whose schema is the newest.
        timing: Waits for locks and answers.

    Attributes:
        transactions: Its transactions; the audit log is read from it.
        clock: The time on its clock.
        identities: The part that says who may speak.
        retention: The part that says which versions have files.
    """

    def __init__(self, url_or_engine: str | Engine, timing: Timing) -> None:
        engine = connect(url_or_engine, timing) if isinstance(url_or_engine, str) else url_or_engine
        self.transactions = Transactions(engine, timing)
        self.clock = self.transactions.clock
        self.identities = Identities(self.transactions)
        self.retention = VersionRetention(self.transactions)
        self._transaction = self.transactions.begin
        self._tell = self.transactions.notices.tell
        self._reading = self.transactions.read

    @classmethod
    def open(cls, url: str, timing: Timing) -> Database:
        """Connects and brings the schema up to date.

        Raises:
            StateInvalid: If the URL is none, the database is corrupt, or its schema is newer than this code.
            DatabaseUnavailable: If it is out of reach.
        """
        engine = connect(url, timing)
        with opening(engine, timing):
            migrate(engine)
        return cls(engine, timing)

    def close(self) -> None:
        """Closes all connections."""
        self.transactions.close()

    @property
    def is_shared(self) -> bool:
        """True if other daemons may use the database, and are told what this one changes."""
        return self.transactions.notices.are_heard

    def tell(self, topic: Topic, keys: Sequence[Any] = ()) -> None:
        """Tells the other daemons something that is not in the database."""
        notices = self.transactions.notices
        with self.transactions.begin() as connection:
            notices.tell(connection, topic, keys)

    def now(self) -> float:
        """Returns the time on the database's clock, in seconds since the epoch."""
        with self._reading() as connection:
            return clock.select_now(connection)

    # Runs and versions

    def create_run(self, run: RunRow, version: VersionRow, audit_events: AuditEvents = ()) -> None:
        """Writes a new run with its version 0.

        Raises:
            RequestIdReused: If a run of the same `request_id` exists.
        """
        with self._transaction(*audit_events) as connection:
            if run.request_id and run_queries.select_run_by_request(connection, run.request_id):
                raise RequestIdReused(f"request {run.request_id} already made a run")
            if run_queries.existing(connection, [run.id]):  # that of a parent's run, which a run that relays it has
                raise RequestIdReused(f"{run.id} is here already")
            run_queries.insert_run(connection, run)
            run_queries.insert_version(connection, version)
            self._tell(connection, Topic.RUN, [run.id])

    def run_by_request(self, request_id: str) -> RunRow | None:
        """Returns the run that a CreateRun call made, or None."""
        with self._reading() as connection:
            return run_queries.select_run_by_request(connection, request_id)

    def run(self, run_id: str) -> RunRow:
        """Returns a run.

        Raises:
            RunNotFound: If there is none of that id.
        """
        with self._reading() as connection:
            return run_queries.select_run(connection, run_id)

    def runs(self) -> list[RunRow]:
        """Returns all runs, oldest first."""
        with self._reading() as connection:
            return run_queries.select_runs(connection)

    def states(self, runs: Sequence[str]) -> dict[str, RunState]:
        """Returns the states of those of some runs that exist."""
        with self._reading() as connection:
            return run_queries.select_states(connection, runs)

    def delete_run(self, run_id: str, audit_events: AuditEvents = ()) -> None:
        """Deletes a run with its versions, rounds, tickets, updates, traffic and evaluations.

        Raises:
            RunNotFound: If there is none of that id.
        """
        with self._transaction(*audit_events) as connection:
            run_queries.delete_run(connection, run_id)
            self._tell(connection, Topic.RUN, [run_id])

    def version(self, run_id: str, version: int) -> VersionRow:
        """Returns a version of a run.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no such version.
        """
        with self._reading() as connection:
            return run_queries.select_version(connection, run_id, version)

    # Transitions; the rounds, tickets and updates that they write

    def transit(self, made: Transition, traffic: Bytes = NONE) -> None:
        """Writes a transition, and adds `traffic` to the counted bytes; nothing if another one was written meanwhile.

        Clients of updates are counted the bytes of the payloads at least.

        Raises:
            RunNotFound: If its run does not exist.
            RevisionMoved: If the run is not at the revision at which the transition begins.
            LeaseLost: If the round was folded by a lease that another daemon has taken since.
        """
        changes, state = made.changes, made.changes.round
        received = {state.ticket(update.ticket).client: update for update in made.updates}
        least = {
            (state.run, state.ticket(update.ticket).issued_in, client): Traffic(
                payload_up=update.manifest.payload_bytes
            )
            for client, update in received.items()
        }
        with self._transaction(*made.audit_events, once=True) as connection:
            run_queries.move(connection, changes)
            if made.epoch:
                leases.check(connection, state.run, made.epoch)
            rounds.put_changes(connection, changes)
            rounds.insert_updates(connection, received)
            rounds.add_traffic(connection, traffic, known=(state.run,))
            rounds.count_at_least(connection, least)
            if made.result is not None:
                rounds.put_result(connection, state, made.result.at, made.result.outcome)
            for version in (made.supplied, made.result.version if made.result else None):
                if version is not None:
                    run_queries.insert_version(connection, version)
            participation.put_conducts(connection, state.run, made.conducts)
            self._tell(connection, Topic.RUN, [state.run])

    def take_lease(self, run_id: str, seconds: float) -> int | None:
        """Takes the right to fold the rounds of a run for some seconds; None if another daemon has it.

        Returns:
            Its epoch, which is higher each time that it is taken.

        Raises:
            RunNotFound: If there is no such run.
        """
        with self._transaction() as connection:
            run_queries.select_revision(connection, run_id)
            return leases.take(connection, run_id, self.transactions.notices.sender, seconds)

    def prolong_lease(self, run_id: str, epoch: int, seconds: float) -> bool:
        """Has that right end so many seconds from now; returns False if another daemon has it."""
        with self._transaction() as connection:
            return leases.prolong(connection, run_id, self.transactions.notices.sender, epoch, seconds)

    def revision(self, run_id: str) -> int:
        """Returns the revision of a run.

        Raises:
            RunNotFound: If there is none of that id.
        """
        with self._reading() as connection:
            return run_queries.select_revision(connection, run_id)

    def revisions(self, *, active: bool) -> dict[str, int]:
        """Returns the revisions of all runs, or of those with rounds left to be held."""
        with self._reading() as connection:
            return run_queries.select_revisions(connection, ACTIVE if active else None)

    def standings(self, run_id: str = "") -> list[tuple[RunRow, Round]]:
        """Returns all runs, oldest first, or the one that is named, each with the round that it is in.

        Raises:
            RunNotFound: If there is none of that id.
        """
        with self._reading() as connection:
            found = [run_queries.select_run(connection, run_id)] if run_id else run_queries.select_runs(connection)
            now = self.clock.time()
            return [(run, _in_progress(run, rounds.select_newest(connection, run.id), now)) for run in found]

    def conducts(self, run_id: str, clients: Sequence[str]) -> dict[str, Conduct]:
        """Returns how clients used their last tickets of a run; nothing of those that never answered."""
        with self._reading() as connection:
            return participation.select_conducts(connection, run_id, clients)

    def poor_conducts(self, run_id: str) -> dict[str, Conduct]:
        """Returns how those clients used their last tickets of a run that did not use them well."""
        with self._reading() as connection:
            return participation.select_poor_conducts(connection, run_id)

    def rounds_from(
        self,
        run_id: str,
        place: Place,
        most_rounds: int,
        most_tickets: int,
        pending: Pending,
        characters: int = figures.RECORDS,
    ) -> tuple[list[RoundFigures], Place | None]:
        """Returns rounds of a run as they are shown, oldest first, and where to go on.

        Args:
            run_id: The run.
            place: Place to begin at.
            most_rounds: Most rounds read.
            most_tickets: Most tickets read, over all rounds; the last round may lack some.
            pending: Bytes that are not in the database yet, by (round number, client), added to what is.
            characters: Most characters of records read, over all rounds; the only round may lack the end of its record
                and all tickets. 0: none.

        Returns:
            The rounds, and the place after them; None at the end.
        """
        with self._reading() as connection:
            return figures.select_from(connection, run_id, place, most_rounds, most_tickets, pending, characters)

    def round_with(self, run_id: str, number: int, tickets: Sequence[str], pending: Pending) -> RoundFigures | None:
        """Returns a round as it is shown, with the named ones of its tickets; None if it was never written."""
        with self._reading() as connection:
            return figures.select_with(connection, run_id, number, tickets, pending)

    def gauge_snapshot(self, run_id: str, number: int) -> GaugeSnapshot:
        """Returns what the gauges of a run show; `number` is its round in progress."""
        with self._reading() as connection:
            return figures.select_gauge_snapshot(connection, run_id, number)

    def ticket_ids(self, run_id: str) -> list[str]:
        """Returns the ids of all tickets of a run."""
        with self._reading() as connection:
            return rounds.select_ticket_ids(connection, run_id)

    def ticket(self, ticket_id: str) -> TicketRow:
        """Returns a ticket.

        Raises:
            TicketNotFound: If there is none of that id.
        """
        with self._reading() as connection:
            return rounds.select_ticket(connection, ticket_id)

    def update(self, ticket_id: str) -> UpdateRow | None:
        """Returns what was received for a ticket, or None."""
        with self._reading() as connection:
            return rounds.select_update(connection, ticket_id)

    def fold_inputs(self, run_id: str, number: int, base: int, earlier: Sequence[int]) -> FoldInputs:
        """Returns what round `number` is folded from, and norms and examples of the `earlier` ones.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no version `base`.
        """
        with self._reading() as connection:
            updates = rounds.select_updates(connection, run_id, number)
            version = run_queries.select_version(connection, run_id, base)
            # That of the round before, not the newest: another server may have committed this one.
            previous, figures = rounds.select_committed_before(connection, run_id, number)
            norms = rounds.select_norms(connection, run_id, earlier)
            ledger = rounds.select_ledger(connection, run_id, number)
        return FoldInputs(updates, version, previous, norms, ledger, figures)

    def pasts(self, run_id: str, number: int, clients: Sequence[str]) -> dict[str, list[Taken]]:
        """Returns what the last rounds before one took some clients, the newest first; see `queries.past`."""
        with self._reading() as connection:
            return past.select_pasts(connection, run_id, number, clients)

    def record_sha256(self, run_id: str, number: int) -> str:
        """Returns the digest of the record of a round, hexadecimal, or "" if there is none."""
        with self._reading() as connection:
            return rounds.select_record_sha256(connection, run_id, number)

    def record(self, run_id: str, number: int) -> tuple[str, Mapping[str, float]]:
        """Returns the record of a round, canonical JSON, and its figures; empty if it is not committed."""
        with self._reading() as connection:
            return rounds.select_record(connection, run_id, number)

    # Traffic and evaluations

    def add_traffic(self, traffic: Bytes) -> None:
        """Adds bytes to what was counted; those of runs that do not exist are dropped."""
        with self._transaction(once=True) as connection:
            rounds.add_traffic(connection, traffic)

    def count_at_least(self, least: Bytes, traffic: Bytes = NONE) -> None:
        """Adds `traffic` to what was counted, then raises payloads that are below `least`, and the wire to them."""
        with self._transaction(once=True) as connection:
            rounds.add_traffic(connection, traffic)
            rounds.count_at_least(connection, least)

    def count_spooled(self, sizes: Mapping[str, int]) -> None:
        """Counts of uploads, by ticket, at least what the spool holds: a process that was killed may not have."""
        with self._transaction() as connection:
            places = rounds.select_places(connection, sizes)
            least = {place: Traffic(payload_up=sizes[ticket]) for ticket, place in places.items()}
            rounds.count_at_least(connection, least)

    def put_evaluation(
        self, run: str, version: int, evaluator: str, split: str, metrics: Mapping[str, float], at: float
    ) -> None:
        """Writes what an evaluator found on a split for a version, in place of what it found before.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no such version.
            MetricsInvalid: If the run has as many other splits as one may have.
        """
        with self._transaction() as connection:
            run_queries.select_version(connection, run, version)
            run_queries.put_evaluation(connection, run, version, evaluator, split, metrics, at)
            self._tell(connection, Topic.SCORED, [(run, version, evaluator, split)])

    def initial_evaluations(self, runs: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns the figures of version 0 of those runs that have some: the latest of each evaluator, merged."""
        with self._reading() as connection:
            found = run_queries.select_initial_evaluations(connection, runs)
        return {run: merged(latest) for run, latest in found.items()}

    def evaluations_by(self, evaluator: str) -> tuple[list[tuple[str, int]], list[tuple[str, int, str]]]:
        """Returns the versions, as (run, version), that an evaluator scored, and those that it could not, with why."""
        with self._reading() as connection:
            scored = run_queries.select_evaluated(connection, evaluator)
            return scored, evaluations.select_failed(connection, evaluator)

    def put_failed_evaluation(self, failure: FailedEvaluation) -> None:
        """Writes that an evaluator could not score a version, in place of what it said before.

        Raises:
            RunNotFound: If there is no such run.
            VersionNotFound: If the run has no such version.
        """
        with self._transaction() as connection:
            run_queries.select_version(connection, failure.run, failure.version)
            evaluations.put_failed(connection, failure)
            self._tell(connection, Topic.EVALUATOR, [failure.evaluator])

    def forget_failed_evaluations(self, evaluator: str, run_id: str = "", version: int = 0) -> None:
        """Deletes what an evaluator could not score: everything, or one version of a run."""
        with self._transaction() as connection:
            evaluations.delete_failed(connection, evaluator, run_id, version)

    # Clients and their answers

    def put_answers(self, answers: Sequence[AnswerRow]) -> list[bool]:
        """Writes what clients answered to offers of runs, in place of what they answered before.

        Returns:
            For each answer True if it was written, False if there is no such run.
        """
        with self._transaction() as connection:
            known = run_queries.existing(connection, (answer.run for answer in answers))
            participation.put_answers(connection, [answer for answer in answers if answer.run in known])
            told = sorted({(answer.run, answer.client) for answer in answers if answer.run in known})
            if told:
                self._tell(connection, Topic.ANSWER, told)
        return [answer.run in known for answer in answers]

    def answers(self) -> list[AnswerRow]:
        """Returns what clients answered, of all runs."""
        with self._reading() as connection:
            return participation.select_answers(connection)

    def answers_of(self, pairs: Sequence[tuple[str, str]]) -> list[AnswerRow]:
        """Returns what clients answered for runs, by (run, client); nothing of those that did not."""
        with self._reading() as connection:
            return participation.select_answers_of(connection, pairs)

    def see_clients(self, clients: Sequence[ClientRow]) -> list[bool]:
        """Writes who clients are, as they register; when one was first seen and what it contributed stay.

        Returns:
            For each client True if it was written, False if another process of it registered meanwhile.
        """
        with self._transaction() as connection:
            written = client_queries.put_clients(connection, clients)
            self._tell(connection, Topic.CLIENT, sorted({client.id for client in clients}))
        return written

    def touch_clients(self, seen: Mapping[str, float]) -> None:
        """Writes when clients were last seen."""
        with self._transaction() as connection:
            client_queries.touch(connection, seen)

    def client(self, client_id: str) -> ClientRow | None:
        """Returns a client, or None if it never registered."""
        with self._reading() as connection:
            return client_queries.select_client(connection, client_id)

    def clients_from(self, after: str, most: int) -> list[ClientRow]:
        """Returns at most so many clients whose id is above `after`, by id."""
        with self._reading() as connection:
            return client_queries.select_clients(connection, after, most)

    def clients_seen(self, since: float) -> dict[str, float]:
        """Returns when those clients were last seen that were since a time."""
        with self._reading() as connection:
            return client_queries.select_seen(connection, since)

    def clients_named(self, clients: Sequence[str]) -> list[ClientRow]:
        """Returns those of some clients that registered."""
        with self._reading() as connection:
            return client_queries.select_named(connection, clients)

    def clients(self) -> list[ClientRow]:
        """Returns all clients by id."""
        with self._reading() as connection:
            return client_queries.select_clients(connection)


def _in_progress(run: RunRow, newest: Round | None, now: float) -> Round:
    """Returns the round that a run is in; one that nobody was sampled for is not in the database."""
    if newest is None:
        return Round(run.id, run.version + 1)
    return in_progress(newest, run.version, run.config.rounds, now, active=run.state in ACTIVE)
