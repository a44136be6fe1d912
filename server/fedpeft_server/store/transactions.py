"""Transactions on the database, and the audit log that grows with them: an event and its entry are written together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from typing import TypeVar

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from fedpeft.errors import DatabaseLocked, DatabaseUnavailable, FedpeftError
from fedpeft.identity import audit
from fedpeft.identity.audit import AuditEntry
from fedpeft_server.clock import DatabaseClock
from fedpeft_server.store import postgresql
from fedpeft_server.store.connection import readers, reading, shown, translated
from fedpeft_server.store.notices.notices import Notices
from fedpeft_server.store.queries import audit as audit_queries
from fedpeft_server.store.rows import AuditEvent
from fedpeft_server.timing import Timing

R = TypeVar("R")

READERS = 3
"""Connections for reading beside the one that writes."""


class Transactions:
    """Makes transactions on one database, one at a time, and lets up to READERS that only read go on beside them.

    Args:
        engine: Connected, its schema the newest.
        timing: Waits for locks and answers.

    Attributes:
        engine: For the one that writes.
        notices: Tells other daemons what transactions change.
        readers: For those that only read, each on a connection of its own.
        clock: The time on the database's clock.
        unavailable: True if the newest transaction but those that only read failed because the database was.
    """

    def __init__(self, engine: Engine, timing: Timing) -> None:
        self.engine = engine
        self.notices = Notices(engine.dialect.name)
        self.clock = DatabaseClock()
        self._where = shown(engine.url)
        self._timing = timing
        # The newest entry, None where it must be read: before the first one, and after a failure, when what was
        # written is not known.
        self._head: AuditEntry | None = None
        self._seen: AuditEntry | None = None  # the newest that is known to have been there, for `went_back`
        self._lacks_seen = False
        self.unavailable = False
        self.readers = readers(engine, READERS, timing)
        self._reading = threading.local()

    @contextmanager
    def begin(self, *events: AuditEvent, once: bool = False) -> Iterator[Connection]:
        """Makes a transaction of what the block does, and of the entries of `events`.

        One whose commit was not answered is looked for, by its last entry in the audit log, or by its number where it
        has none and must be made `once`: repeated, it would be told twice, and its bytes counted twice.

        Raises:
            DiskFull: If there is no room; the transaction is undone.
            DatabaseLocked: If another program holds a lock, or wrote to the audit log meanwhile; nothing was done.
            DatabaseUnavailable: If the database is corrupt or out of reach; the transaction is undone, or its outcome
                unknown.
        """
        if self._snapshot is not None:
            raise RuntimeError("a method that writes was called where only reading is possible; use `Store.transact`")
        before, is_complete, number = self._head, False, None
        try:
            with translated(self._where, self._timing), self.engine.begin() as connection:
                if once and not events and self.notices.are_heard:
                    number = postgresql.transaction_number(connection)
                yield connection
                for event in events:
                    self.append(connection, event)
                is_complete = True
        except BaseException as error:
            last, self._head = self._head, None
            self.unavailable = isinstance(error, DatabaseUnavailable)
            entry = None if last is before else last
            if not (is_complete and self.unavailable and self._is_made(entry, number)):
                raise
            self._head = last
        self.unavailable = False
        if self._head is not before:
            self._seen = self._head

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Makes a transaction that only reads, or goes on with the snapshot of `begin_read`.

        It waits for no program that writes.

        Raises:
            DatabaseLocked: If another program lets nobody read.
            DatabaseUnavailable: If the database is corrupt or out of reach.
        """
        with translated(self._where, self._timing):
            if self._snapshot is not None:
                yield self._snapshot
                return
            with reading(self.engine) as connection:
                yield connection

    @property
    def _snapshot(self) -> Connection | None:
        """The snapshot that this thread reads from; None if it reads from none."""
        return getattr(self._reading, "snapshot", None)

    def begin_read(self, threads: Executor, method: Callable[[], R]) -> Future[R]:
        """Begins a transaction that only reads, on a connection of its own, for a method that one of `threads` calls.

        To be called between the other transactions: the method sees what is written by now. The connection is closed
        whatever becomes of the caller.

        Raises:
            FedpeftError: As `read`.
        """
        snapshot = self._take_snapshot()
        try:
            reading = threads.submit(self._read_from, snapshot, method)
        except BaseException:
            _close(snapshot)
            raise
        reading.add_done_callback(lambda _: _close(snapshot))
        return reading

    def _take_snapshot(self) -> Connection:
        with translated(self._where, self._timing):
            connection = self.readers.connect()
            try:
                connection.execute(text("SELECT id FROM runs LIMIT 1"))  # only a statement fixes what is seen
            except BaseException:
                connection.close()
                raise
        return connection

    def _read_from(self, snapshot: Connection, method: Callable[[], R]) -> R:
        self._reading.snapshot = snapshot
        try:
            return method()
        finally:
            self._reading.snapshot = None

    def probe(self) -> None:
        """Reads from the database; writes as well, though no row, if it was unavailable.

        Raises:
            FedpeftError: As `begin`.
        """
        if not self.unavailable:
            with self.read() as connection:
                connection.execute(text("SELECT 1"))
            return
        with self.begin() as connection:
            connection.execute(text("UPDATE runs SET id = id WHERE id = ''"))

    def wait_at_most(self, seconds: float) -> None:
        """Has a statement wait no longer for another program's lock, where the database is SQLite."""
        if self.engine.dialect.name == "sqlite":
            with self.read() as connection:
                connection.exec_driver_sql(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def entries_after(self, number: int, most: int) -> list[AuditEntry]:
        """Returns the first so many entries of the audit log above a number, oldest first."""
        with self.read() as connection:
            return audit_queries.select_after(connection, number, most)

    def went_back(self) -> bool:
        """Returns True if an entry of the audit log that was written here, or seen by this method, is gone.

        Entries are added and never changed, so the database is then older than it was.
        """
        with self.read() as connection:
            newest = audit_queries.select_last(connection)
            self._look_for_seen(connection, newest)
        self._seen = newest
        return self._lacks_seen

    def _look_for_seen(self, connection: Connection, newest: AuditEntry | None) -> None:
        """Notes that the entry which was seen last is gone; `newest` is the one that is the newest now."""
        seen = self._seen
        if seen is not None and newest != seen:
            self._lacks_seen |= audit_queries.select_after(connection, seen.number - 1, 1) != [seen]

    def write(self, *events: AuditEvent) -> None:
        """Writes entries for what the database knows nothing else of."""
        with self.begin(*events):
            pass

    def close(self) -> None:
        """Closes all connections."""
        self.readers.dispose()
        self.engine.dispose()  # the last one to close a SQLite database tidies it up

    def _is_made(self, entry: AuditEntry | None, number: int | None) -> bool:
        """Returns True if a transaction that was not answered is in the database; False if nobody can say.

        It may be under way: its commit is on the line, or waits for the disk. Then its end is waited for. An entry is
        the surer sign: after a failover that lost the transaction, another one may have its number.

        Args:
            entry: Its last entry in the audit log; None if it has none.
            number: Its number; None if it is not known.
        """
        if not self.notices.are_heard:  # SQLite: no line lies between, so the failure is the answer
            return False
        try:
            with self.read() as connection:
                if entry is not None:
                    audit_queries.lock(connection)  # which it holds until it ends
                    return audit_queries.select_after(connection, entry.number - 1, 1) == [entry]
                most_s = self._timing.database_busy_s
                return number is not None and postgresql.is_committed(connection, number, most_s)
        except FedpeftError:
            return False

    def append(self, connection: Connection, event: AuditEvent) -> None:
        """Writes an entry in a transaction of this object's.

        Raises:
            DatabaseLocked: If another server has written an entry since the newest that is known here.
        """
        audit_queries.lock(connection)
        previous = None if self.notices.are_heard else self._head
        previous = previous or audit_queries.select_last(connection)
        if self.notices.are_heard:  # now, for afterwards the entry that is added here is the newest that was seen
            self._look_for_seen(connection, previous)
        entry = audit.entry(previous, self.clock.time(), event.actor, event.action, event.object, event.details)
        try:
            audit_queries.insert_entry(connection, entry)
        except IntegrityError:
            text = f"entry {entry.number} of the audit log was written by another server meanwhile"
            raise DatabaseLocked(text) from None
        self._head = entry


def _close(snapshot: Connection) -> None:
    """Closes a snapshot, after which nobody needs its connection."""
    with suppress(DBAPIError):  # it was lost, which ends the transaction as well; the pool makes another
        snapshot.close()
