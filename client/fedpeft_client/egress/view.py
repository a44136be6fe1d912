"""The ledger for people: one row a transfer, however often it was begun, and what all of them come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fedpeft.formatting import counted, size
from fedpeft.untrusted_text import plain
from fedpeft_client.egress.entries import EgressEntry, Kind, LoggedEntry, Outcome

MOST_NAME = 20
"""Characters of a run's name in the table; `--json` has it whole."""


@dataclass(frozen=True)
class Row:
    """One transfer.

    Attributes:
        attempts: Every time that it was begun, in order; an upload that breaks off goes on as another one.
    """

    attempts: tuple[LoggedEntry, ...]

    @property
    def entry(self) -> EgressEntry:
        """Last entry of all attempts."""
        return self.attempts[-1].entry

    @property
    def at(self) -> datetime:
        """Time of the first attempt."""
        return self.attempts[0].at

    @property
    def wire_bytes(self) -> int:
        """Bytes of all attempts; where it is not known how many went, all that were to go."""
        return sum(each.entry.wire_bytes for each in self.attempts)

    @property
    def outcome(self) -> Outcome:
        """Outcome of the last attempt."""
        return self.attempts[-1].outcome

    def as_json(self) -> dict[str, Any]:
        """Returns all that the ledger has of it."""
        last, entry = self.attempts[-1], self.entry
        return {
            "at": self.at.isoformat(),
            "ended": last.ended.isoformat() if last.ended else None,
            "server": last.server,
            **vars(entry),
            "wire_bytes": self.wire_bytes,
            "attempts": len(self.attempts),
            "outcome": self.outcome,
            "words": last.words,
        }

    def cells(self) -> list[str]:
        """Returns what the table says of it; nothing that came from a server reaches a terminal as it is."""
        entry = self.entry
        cells = [
            f"{self.at.astimezone():%Y-%m-%d %H:%M:%S}",
            entry.kind,
            _short(entry.name or entry.run),
            str(entry.round) if entry.round else "",
            size(entry.payload_bytes) if entry.payload_bytes else "",
            size(self.wire_bytes),
            str(self.outcome),
        ]
        return [plain(cell) for cell in cells]

    def text(self) -> str:
        """Returns what left, and what became of it if there is more to say; safe for a terminal as `cells` are."""
        what = describe(self.entry) + (f" ({len(self.attempts)} attempts)" if len(self.attempts) > 1 else "")
        words = self.attempts[-1].words
        return plain(f"{what}; {self.outcome}: {words}" if words else what)


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else name[: MOST_NAME - 1] + "…"


def rows(booked: Iterable[LoggedEntry]) -> list[Row]:
    """Returns the transfers of a ledger: the uploads of one update are one."""
    found: dict[object, list[LoggedEntry]] = {}
    for number, each in enumerate(booked):
        entry = each.entry
        update = entry.kind is Kind.UPDATE
        key = (entry.run, entry.ticket, entry.said.get("sha256")) if update else number
        found.setdefault(key, []).append(each)
    return [Row(tuple(attempts)) for attempts in found.values()]


def totals(found: Iterable[Row]) -> dict[str, dict[str, int]]:
    """Returns transfers, payload bytes and wire bytes, by kind, for those kinds that there are, and of all."""
    sums: dict[str, dict[str, int]] = {}
    for row in found:
        for key in (str(row.entry.kind), "all"):
            into = sums.setdefault(key, {"transfers": 0, "payload_bytes": 0, "wire_bytes": 0})
            into["transfers"] += 1
            into["payload_bytes"] += row.entry.payload_bytes
            into["wire_bytes"] += row.wire_bytes
    return sums


def describe(entry: EgressEntry) -> str:
    """Returns what left, in words; where its line was changed by hand, that there are none."""
    try:
        return _WORDS[entry.kind](entry.said)
    except (KeyError, TypeError, ValueError):
        return "what was in it cannot be read"


def _enrolment(said: Mapping[str, Any]) -> str:
    return f"a signing request for a key made here, the token's secret, software {said.get('software') or 'unknown'}"


def _registration(said: Mapping[str, Any]) -> str:
    dry = "dry run" if said.get("dry_run") else ""
    examples = counted(said.get("examples", 0), "example")
    return ", ".join(str(part) for part in (said.get("role"), examples, said.get("device"), dry) if part)


def _answer(said: Mapping[str, Any]) -> str:
    if said.get("reasons"):
        return f"{said.get('answer')}: {'; '.join(said['reasons'])}"
    return f"{said.get('answer')}, {counted(said.get('examples', 0), 'example')}"


def _update(said: Mapping[str, Any]) -> str:
    tensors, parameters = counted(said["tensors"], "tensor"), counted(said["parameters"], "parameter")
    what = f"{tensors}, {parameters}, {said.get('encoding')}"
    return f"{what}, of {counted(said.get('examples', 0), 'example')}, sha256 {str(said.get('sha256'))[:12]}"


def _evaluation(said: Mapping[str, Any]) -> str:
    if said.get("failure"):
        return f"version {said.get('version')} cannot be scored: {said['failure']}"
    figures = said.get("metrics", {})
    accuracy = f", accuracy {figures['accuracy']:.3f}" if "accuracy" in figures else ""
    return f"version {said.get('version')}: {counted(len(figures), 'figure')}{accuracy}"


def _questions(said: Mapping[str, Any]) -> str:
    return "for work, adapter versions and upload offsets; booked together, in advance"


def _withdrawal(said: Mapping[str, Any]) -> str:
    return str(said.get("reason") or "no reason given")


def _leave(said: Mapping[str, Any]) -> str:
    return f"for good: {said['reason']}" if said.get("reason") else "for good"


_WORDS = {
    Kind.ENROLMENT: _enrolment,
    Kind.REGISTRATION: _registration,
    Kind.ANSWER: _answer,
    Kind.UPDATE: _update,
    Kind.EVALUATION: _evaluation,
    Kind.WITHDRAWAL: _withdrawal,
    Kind.LEAVE: _leave,
    Kind.QUESTIONS: _questions,
}
