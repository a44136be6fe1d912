"""The egress log: everything that leaves this device, recorded here before it is sent.

Whoever sends something books it with what is in it; the bytes are counted where messages pass, each time that one is
sent (traffic.py). A repetition for which there is no room in what was booked is booked before it leaves, and twice as
much with it: a server that stays away makes few lines. What is in them, and how a crash is read, is said in
entries.py.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from fedpeft.errors import FedpeftError, LocalError
from fedpeft_client.egress.entries import FILE, EgressEntry, Kind, Outcome, carried, closing, opening, read
from fedpeft_client.egress.last_day import DAY, LastDay
from fedpeft_client.egress.log_file import EgressLogFile
from fedpeft_client.error_policy import FAULT, NOT_NOW
from fedpeft_client.state.bounded import BoundedDict

FILE_BYTES = 4 * 1024 * 1024
"""A file of so many bytes is set aside: what is read at a start is one, and those of the last 24 hours."""
QUESTIONS_BYTES = 4 * 1024
"""Questions are booked together, so many bytes of them ahead: a line for each would be thousands a day."""


NAMED = 1024
"""Runs for which nothing was trained whose names are kept: a server may offer as many as it likes."""


@dataclass
class _OpenEntry:
    """An entry that is under way: as it is booked, and how many bytes of it have gone."""

    entry: EgressEntry
    sent_bytes: int = 0
    number: str = field(default_factory=lambda: secrets.token_hex(8))


class EgressLog:
    """The egress log of a state directory, for the one process that holds it.

    Args:
        folder: The state directory.
        server: HOST:PORT of the server that things are sent to.

    Attributes:
        day: Bytes sent in the last 24 hours.
        unreadable: Lines that could not be read at the start; what they booked is not counted.

    Raises:
        StateInvalid: If it cannot be written: nothing leaves without it.
    """

    def __init__(self, folder: Path, server: str) -> None:
        self.path = folder / FILE
        self.day = LastDay()
        self._server = server
        self._file = EgressLogFile(self.path)
        self._names: dict[str, str] = {}  # of runs with tickets
        self._offered: BoundedDict[str, str] = BoundedDict(NAMED)  # names of the others
        self._carried_bytes = 0
        self._tickets: defaultdict[str, set[str]] = defaultdict(set)
        self._under_way: _OpenEntry | None = None
        self._questions: _OpenEntry | None = None
        known = read(self.path, datetime.now(UTC) - DAY)
        self.unreadable = known.unreadable
        for run, tickets in known.tickets.items():
            self._tickets[run] |= tickets
        for run, name in known.names.items():
            self._name(run, name)
        for number, each in sorted(known.booked.items(), key=lambda item: item[1].latest):
            self._count(number, each.entry, each.latest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; every line is durable already."""
        try:
            self._settle_questions()
        finally:
            self._file.close()

    @contextmanager
    def record(self, entry: EgressEntry) -> Iterator[None]:
        """Books an entry around the code that sends it, once or again and again; one at a time.

        Raises:
            StateInvalid: If the ledger cannot be written; then nothing is sent.
        """
        if self._under_way is not None:
            raise RuntimeError(f"{entry.kind} was booked while {self._under_way.entry.kind} is under way")
        booking = self._opened(entry)
        self._under_way = booking
        outcome, words = Outcome.UNFINISHED, ""
        try:
            yield
            outcome = Outcome.RECEIVED
        except FedpeftError as error:
            again = isinstance(error, (LocalError, FAULT, *NOT_NOW)) or error.retry_s is not None
            outcome = Outcome.UNFINISHED if again else Outcome.REFUSED
            words = f"{error.reason}: {error.message}"
            raise
        finally:
            self._under_way = None
            self._close(booking, outcome, words)

    def sending(self, size_bytes: int) -> None:
        """Counts a message of the recorded entry, which is about to be sent.

        Raises:
            StateInvalid: If it needs another line and the ledger cannot be written; then it is not sent.
        """
        booking = self._under_way
        if booking is None:
            raise RuntimeError("a message was about to leave without an entry in the ledger")
        total, before = booking.sent_bytes + size_bytes, booking.entry.wire_bytes
        if total > before:
            booking.entry = replace(booking.entry, wire_bytes=max(total, 2 * before))
            self._open(booking)
        booking.sent_bytes = total

    def polling(self, size_bytes: int) -> None:
        """Counts a small request for work, which is about to be sent.

        Raises:
            StateInvalid: If the ledger cannot be written; then it is not asked.
        """
        if self._questions is None or self._questions.sent_bytes + size_bytes > QUESTIONS_BYTES:
            self._settle_questions()
            self._questions = self._opened(EgressEntry(Kind.QUESTIONS, max(size_bytes, QUESTIONS_BYTES), {}))
        self._questions.sent_bytes += size_bytes

    def tickets(self, run: str) -> frozenset[str]:
        """Returns the tickets of a run for which tensors have left."""
        return frozenset(self._tickets.get(run, ()))

    def forget(self, run: str) -> None:
        """Forgets the tickets of a run that is over; the lines about it stay."""
        self._tickets.pop(run, None)
        self._names.pop(run, None)
        self._offered.pop(run, None)

    def _settle_questions(self) -> None:
        if self._questions is not None:
            booking, self._questions = self._questions, None
            self._close(booking, Outcome.RECEIVED, "")

    def _opened(self, entry: EgressEntry) -> _OpenEntry:
        booking = _OpenEntry(replace(entry, name=entry.name or self._name_of(entry.run)))
        self._open(booking)
        return booking

    def _open(self, booking: _OpenEntry) -> None:
        now = datetime.now(UTC)
        if self._file.size_bytes - self._carried_bytes >= FILE_BYTES:  # however much the last one handed on
            self._file.begin_another(carried(now, {**self._offered, **self._names}, self._tickets))
            self._carried_bytes = self._file.size_bytes
        self._file.add(opening(booking.number, now, self._server, booking.entry))
        self._count(booking.number, booking.entry, now)

    def _close(self, booking: _OpenEntry, outcome: Outcome, words: str) -> None:
        now = datetime.now(UTC)
        self.day.count(booking.number, now, booking.sent_bytes)
        self._file.add(closing(booking.number, now, outcome, booking.sent_bytes, words))

    def _count(self, number: str, entry: EgressEntry, at: datetime) -> None:
        if entry.kind is Kind.UPDATE:
            self._tickets[entry.run].add(entry.ticket)
        if entry.run and (name := entry.name or self._name_of(entry.run)):
            self._name(entry.run, name)
        self.day.count(number, at, entry.wire_bytes)

    def _name_of(self, run: str) -> str:
        return self._names.get(run) or self._offered.get(run, "")

    def _name(self, run: str, name: str) -> None:
        if run in self._tickets:
            self._names[run] = name
            self._offered.pop(run, None)
        else:
            self._offered.put(run, name)
