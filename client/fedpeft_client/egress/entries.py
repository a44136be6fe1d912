"""Lines of an egress log: one for each entry before it leaves, another one for its outcome; how they are read.

    {"id": ID, "at": TIME, "kind": "update", "server": ..., "run": ..., "name": ..., "round": ..., "ticket": ...,
     "wire_bytes": BOOKED, "payload_bytes": ..., "said": {...}}
    {"id": ID, "at": TIME, "outcome": "received", "wire_bytes": SENT, "words": ""}

    {"at": TIME, "carried": {"names": {RUN: NAME}, "tickets": {RUN: [TICKET, ...]}}}

The last begins a file that goes on where another one was set aside (log_file.py): what the client must know of what
is in that one, so that it need not be read at each start. Where more is about to leave than was booked, because a call
is repeated, a line of the first kind comes again, with more bytes. If no second one follows, because the process was
killed, what was booked counts in full: the ledger never tells too little.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from fedpeft.errors import StateInvalid
from fedpeft.formatting import counted
from fedpeft_client.egress.log_file import archives

FILE = "ledger.jsonl"
"""In the state directory."""


class Kind(StrEnum):
    """Kind of an entry."""

    ENROLMENT = "enrolment"
    """The request for the first certificate, with the token's secret."""
    REGISTRATION = "registration"
    """This client's description of itself."""
    ANSWER = "answer"
    """An answer to the offer of a run: accepted, or declined with the reasons that were told."""
    UPDATE = "update"
    """Tensors, trained here."""
    EVALUATION = "evaluation"
    """Figures of a version, measured here."""
    WITHDRAWAL = "withdrawal"
    """A ticket given back, with the words that were told."""
    LEAVE = "leave"
    """That this client leaves for good, with the words that were told."""
    QUESTIONS = "questions"
    """Many small calls that tell nothing: for work, an adapter version, where an upload stands, a certificate."""


class Outcome(StrEnum):
    """Outcome of an entry."""

    RECEIVED = "received"
    """The server has it and said so: for an update, the receipt."""
    REFUSED = "refused"
    """The server got it and did not want it."""
    UNFINISHED = "unfinished"
    """Broken off; what is counted may have arrived."""
    OPEN = "open"
    """Under way, or its process ended before it heard; what was booked is counted."""


@dataclass(frozen=True)
class EgressEntry:
    """An entry of the egress log: something that is about to leave the device.

    Attributes:
        kind: Kind of message.
        wire_bytes: Size of the messages that carry it.
        said: Its content, in words and numbers.
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


@dataclass(frozen=True)
class LoggedEntry:
    """An entry as it stands in the log, with its outcome.

    Attributes:
        entry: The message; `wire_bytes` is its size as sent, or as booked where that is not known.
        at: Time right before it was sent.
        latest: Time of the last line on it.
        server: Its destination.
        outcome: Its outcome.
        words: The server's sentence, if it refused it.
    """

    entry: EgressEntry
    at: datetime
    latest: datetime
    server: str
    outcome: Outcome = Outcome.OPEN
    words: str = ""

    @property
    def ended(self) -> datetime | None:
        """Time at which its outcome was known; None if it never was."""
        return None if self.outcome is Outcome.OPEN else self.latest


@dataclass
class Contents:
    """Contents of an egress log: entries in the order in which they were booked, and the number of unreadable lines.

    Attributes:
        booked: The entries, by number.
        unreadable: Lines that cannot be read.
        names: Names of runs, as they were carried over from files before.
        tickets: Tickets for which tensors have left, by run, likewise.
    """

    booked: dict[str, LoggedEntry] = field(default_factory=dict)
    unreadable: int = 0
    names: dict[str, str] = field(default_factory=dict)
    tickets: dict[str, set[str]] = field(default_factory=dict)

    def add(self, line: str) -> None:
        """Takes one line."""
        try:
            data = json.loads(line)
            if "carried" in data:
                self.names |= {str(run): str(name) for run, name in data["carried"]["names"].items()}
                for run, tickets in data["carried"]["tickets"].items():
                    self.tickets.setdefault(str(run), set()).update(map(str, tickets))
                return
            at, before = _moment(data["at"]), self.booked.get(data["id"])
            if "kind" in data:
                entry = _entry(data)
                self.booked[data["id"]] = LoggedEntry(entry, before.at if before else at, at, str(data["server"]))
            else:
                self.booked[data["id"]] = _closed(self.booked[data["id"]], data, at)
        except (AttributeError, ValueError, KeyError, TypeError):
            self.unreadable += 1


def unreadable_text(lines: int) -> str:
    """Returns the sentence for lines of a ledger that cannot be read."""
    return f"{counted(lines, 'line')} of the ledger cannot be read: cut off by a crash, or changed by hand"


def read(path: Path, since: datetime | None = None) -> Contents:
    """Reads a ledger, also one that is being written, with the files that were set aside.

    Args:
        path: The newest file.
        since: Of those that were set aside, only those that were written to since then are read; None: all.

    Raises:
        StateInvalid: If there is none, or it cannot be read.
    """
    contents = Contents()
    try:
        with path.open("rb") as newest:
            own = os.fstat(newest.fileno())
            for each in archives(path):
                stat = each.stat()
                if stat.st_ino != own.st_ino and (since is None or stat.st_mtime >= since.timestamp()):
                    _take(contents, each.read_bytes())
            _take(contents, newest.read())
    except FileNotFoundError:
        raise StateInvalid(f"there is no ledger at {path}; no client has used this state directory") from None
    except OSError as error:
        raise StateInvalid(f"cannot read the ledger {path}: {error.strerror}") from None
    return contents


def _take(contents: Contents, data: bytes) -> None:
    lines = data.decode("utf-8", "replace").split("\n")
    if not _is_whole(lines[-1]):  # it is being written, or was cut off: it never left
        lines.pop()
    for line in filter(None, lines):
        contents.add(line)


def carried(at: datetime, names: Mapping[str, str], tickets: Mapping[str, Iterable[str]]) -> Mapping[str, Any]:
    """Returns the line that begins a file which goes on where another one was set aside."""
    known = {run: sorted(each) for run, each in tickets.items() if each}
    return {"at": _text(at), "carried": {"names": dict(names), "tickets": known}}


def opening(number: str, at: datetime, server: str, entry: EgressEntry) -> Mapping[str, Any]:
    """Returns the line for what is about to leave."""
    return {"id": number, "at": _text(at), "server": server, **vars(entry)}


def closing(number: str, at: datetime, outcome: Outcome, wire_bytes: int, words: str) -> Mapping[str, Any]:
    """Returns the line for what became of it."""
    return {"id": number, "at": _text(at), "outcome": outcome, "wire_bytes": wire_bytes, "words": words}


def _is_whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _moment(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError("a time without its zone")
    return at


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds")


def _entry(data: Mapping[str, Any]) -> EgressEntry:
    return EgressEntry(
        Kind(data["kind"]),
        int(data["wire_bytes"]),
        dict(data["said"]),
        str(data["run"]),
        str(data["name"]),
        int(data["round"]),
        str(data["ticket"]),
        int(data["payload_bytes"]),
    )


def _closed(before: LoggedEntry, data: Mapping[str, Any], at: datetime) -> LoggedEntry:
    sent = replace(before.entry, wire_bytes=int(data["wire_bytes"]))
    return replace(before, entry=sent, latest=at, outcome=Outcome(data["outcome"]), words=str(data["words"]))
