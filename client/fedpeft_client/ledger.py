"""The ledger: everything that left this device, written here and before it left.

One line of JSON for what is about to be sent, durable before the first byte goes; one more for what became of it:

    {"id": ID, "at": TIME, "kind": "update", "server": ..., "run": ..., "name": ..., "round": ..., "ticket": ...,
     "wire_bytes": PLANNED, "payload_bytes": ..., "said": {...}}
    {"id": ID, "at": TIME, "outcome": "received", "wire_bytes": SENT, "words": ""}

A process that is killed in between leaves the first line alone: it counts in full, so the ledger never tells too
little. A line cut off by a crash is the last one; the next process begins a new line behind it. Nothing is ever changed
or removed by this software.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedpeft import durable
from fedpeft.errors import FedpeftError, StateInvalid
from fedpeft_client.patience import NOT_NOW

FILE = "ledger.jsonl"
"""In the state directory."""

DAY = timedelta(days=1)

QUESTIONS_BYTES = 4 * 1024
"""Questions are booked together, so many bytes of them ahead: a line for each would be thousands a day."""


class Kind(StrEnum):
    """What left."""

    REGISTRATION = "registration"
    """What this client said of itself."""
    ANSWER = "answer"
    """Whether it takes part in a run, and if not, the words that were told."""
    UPDATE = "update"
    """Tensors, trained here."""
    EVALUATION = "evaluation"
    """Figures of a version, measured here."""
    WITHDRAWAL = "withdrawal"
    """A ticket given back, with the words that were told."""
    QUESTIONS = "questions"
    """Many small calls that tell nothing: for work, an adapter version, where an upload stands, a certificate."""


class Outcome(StrEnum):
    """What became of it."""

    RECEIVED = "received"
    """The server has it and said so: for an update, the receipt."""
    REFUSED = "refused"
    """The server got it and did not want it."""
    UNFINISHED = "unfinished"
    """Broken off; what is counted may have arrived."""
    OPEN = "open"
    """Under way, or its process ended before it heard; what was planned is counted."""


@dataclass(frozen=True)
class Departure:
    """What is about to leave.

    Attributes:
        kind: What it is.
        wire_bytes: Size of the messages that carry it.
        said: What is in it, in words and numbers.
        run: Id of the run; empty for none.
        name: The run's name; if empty, the one known from before.
        round: Number of the round; 0 for none.
        ticket: Id of the ticket; empty for none.
        payload_bytes: Tensors in it, encoded.
    """

    kind: Kind
    wire_bytes: int
    said: Mapping[str, Any]
    run: str = ""
    name: str = ""
    round: int = 0
    ticket: str = ""
    payload_bytes: int = 0


@dataclass
class Booking:
    """A departure that is under way; whoever sends it may correct how many bytes have gone."""

    wire_bytes: int


@dataclass(frozen=True)
class Booked:
    """A departure as the ledger has it.

    Attributes:
        departure: What left; `wire_bytes` is what was sent, or planned where that is not known.
        at: When it was about to.
        server: Where to.
        outcome: What became of it.
        words: What the server said of it, if it did not want it.
        ended: When that was known; None if it never was.
    """

    departure: Departure
    at: datetime
    server: str
    outcome: Outcome = Outcome.OPEN
    words: str = ""
    ended: datetime | None = None


@dataclass
class Contents:
    """What is in a ledger: departures in the order in which they were booked, and how many lines cannot be read."""

    booked: dict[str, Booked] = field(default_factory=dict)
    unreadable: int = 0

    def add(self, line: str) -> None:
        """Takes one line."""
        try:
            data = json.loads(line)
            at = datetime.fromisoformat(data["at"])
            if "kind" in data:
                self.booked[data["id"]] = _opened(data, at)
            else:
                before = self.booked[data["id"]]
                self.booked[data["id"]] = _closed(before, data, at)
        except (ValueError, KeyError, TypeError):
            self.unreadable += 1


def read(path: Path) -> Contents:
    """Reads a ledger, also one that is being written.

    Raises:
        StateInvalid: If there is none, or it cannot be read.
    """
    contents = Contents()
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
    except FileNotFoundError:
        raise StateInvalid(f"there is no ledger at {path}; no client has used this state directory") from None
    except OSError as error:
        raise StateInvalid(f"cannot read the ledger {path}: {error.strerror}") from None
    for line in lines[:-1]:  # what follows the last line's end is being written, or was cut off: it never left
        if line:
            contents.add(line)
    return contents


def _opened(data: dict[str, Any], at: datetime) -> Booked:
    departure = Departure(
        Kind(data["kind"]),
        int(data["wire_bytes"]),
        dict(data["said"]),
        str(data["run"]),
        str(data["name"]),
        int(data["round"]),
        str(data["ticket"]),
        int(data["payload_bytes"]),
    )
    return Booked(departure, at, str(data["server"]))


def _closed(before: Booked, data: dict[str, Any], at: datetime) -> Booked:
    sent = Departure(**{**vars(before.departure), "wire_bytes": int(data["wire_bytes"])})
    return Booked(sent, before.at, before.server, Outcome(data["outcome"]), str(data["words"]), at)


class Ledger:
    """The ledger of a state directory, for the one process that holds it.

    Args:
        folder: The state directory.
        server: Where things leave to.

    Raises:
        StateInvalid: If it cannot be written: nothing leaves without it.
    """

    def __init__(self, folder: Path, server: str) -> None:
        self.path = folder / FILE
        self._server = server
        with self._writing():
            new = not self.path.exists()
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            if new:
                durable.sync(folder)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")
        self._names: dict[str, str] = {}
        self._tickets: defaultdict[str, set[str]] = defaultdict(set)
        # By id, when each was over, for its last byte may have left as late as that, and its bytes.
        self._recent: OrderedDict[str, tuple[datetime, int]] = OrderedDict()
        self._torn = False
        self._questions: tuple[str, Booking] | None = None
        before = [(each.ended or each.at, number, each) for number, each in read(self.path).booked.items()]
        for at, number, each in sorted(before, key=lambda one: one[0]):
            self._count(number, each.departure, at)

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
            os.close(self._file)

    def asked(self, size_bytes: int) -> None:
        """Books a question that is about to be asked.

        Raises:
            StateInvalid: If the ledger cannot be written; then it is not asked.
        """
        if self._questions is None or self._questions[1].wire_bytes + size_bytes > QUESTIONS_BYTES:
            self._settle_questions()
            number = secrets.token_hex(8)
            self._open(number, Departure(Kind.QUESTIONS, max(size_bytes, QUESTIONS_BYTES), {}))
            self._questions = number, Booking(0)
        self._questions[1].wire_bytes += size_bytes

    def _settle_questions(self) -> None:
        if self._questions is not None:
            (number, booking), self._questions = self._questions, None
            self._close(number, booking, Outcome.RECEIVED, "")

    @contextmanager
    def booked(self, departure: Departure) -> Iterator[Booking]:
        """Books a departure around the code that sends it.

        Raises:
            StateInvalid: If the ledger cannot be written; then nothing is sent.
        """
        booking, number = Booking(departure.wire_bytes), secrets.token_hex(8)
        self._open(number, departure)
        outcome, words = Outcome.UNFINISHED, ""
        try:
            yield booking
            outcome = Outcome.RECEIVED
        except FedpeftError as error:
            again = isinstance(error, NOT_NOW) or error.retry_s is not None
            outcome = Outcome.UNFINISHED if again else Outcome.REFUSED
            words = f"{error.reason}: {error.message}"
            raise
        finally:
            self._close(number, booking, outcome, words)

    def tickets(self, run: str) -> frozenset[str]:
        """Returns the tickets of a run for which tensors have left."""
        return frozenset(self._tickets[run])

    def left_since(self, begin: datetime) -> int:
        """Returns how many bytes left since a time of the last 24 hours."""
        return sum(size for at, size in self._recent.values() if at >= begin)

    def falls_below(self, most: int, now: datetime) -> datetime:
        """Returns when no more than `most` bytes will have left in the 24 hours before, if nothing more leaves."""
        total = self.left_since(now - DAY)
        for at, size in self._recent.values():
            if total <= most:
                break
            if at >= now - DAY:
                total, now = total - size, at + DAY
        return now

    def _open(self, number: str, departure: Departure) -> None:
        now = datetime.now(UTC)
        departure = Departure(**{**vars(departure), "name": departure.name or self._names.get(departure.run, "")})
        self._write({"id": number, "at": _text(now), "server": self._server, **vars(departure)})
        self._count(number, departure, now)

    def _close(self, number: str, booking: Booking, outcome: Outcome, words: str) -> None:
        now = datetime.now(UTC)
        self._recent.pop(number, None)
        self._recent[number] = now, booking.wire_bytes
        line = {"id": number, "at": _text(now), "outcome": outcome}
        self._write({**line, "wire_bytes": booking.wire_bytes, "words": words})

    def _count(self, number: str, departure: Departure, at: datetime) -> None:
        if departure.run and departure.name:
            self._names[departure.run] = departure.name
        if departure.kind is Kind.UPDATE:
            self._tickets[departure.run].add(departure.ticket)
        self._recent[number] = at, departure.wire_bytes
        while next(iter(self._recent.values()))[0] < at - DAY:
            self._recent.popitem(last=False)

    def _write(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        if self._torn:
            data = b"\n" + data
        self._torn = True  # until it is whole: a full disk may take half of it
        with self._writing():
            done = 0
            while done < len(data):
                done += os.write(self._file, data[done:])
            self._torn = False
            os.fsync(self._file)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateInvalid(
                f"cannot write the ledger {self.path}: {error.strerror}; nothing leaves this device without it"
            ) from None


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")
