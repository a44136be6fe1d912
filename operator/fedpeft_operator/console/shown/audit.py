"""Contents of the audit log's page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from fedpeft.identity.audit import AuditEntry

SHORT_DIGEST = 12
"""Digits of a digest that are shown; the command line has all of them."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class AuditRow:
    """An entry for people.

    Attributes:
        number: From 1, without a gap.
        at: ISO 8601.
        actor: The one who did it.
        action: The action.
        object: To what; may be empty.
        details: More of it, as (name, value).
        sha256: Digest of the entry.
    """

    number: int
    at: str
    actor: str
    action: str
    object: str
    details: tuple[tuple[str, str], ...]
    sha256: str


def rows(entries: Sequence[AuditEntry]) -> list[AuditRow]:
    """Returns entries for people, newest first."""
    return [_row(entry) for entry in sorted(entries, key=lambda entry: -entry.number)]


def _row(entry: AuditEntry) -> AuditRow:
    at = datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return AuditRow(entry.number, at, entry.actor, entry.action, entry.object, _details(entry.details), entry.sha256)


def _details(text: str) -> tuple[tuple[str, str], ...]:
    """Returns the details by name; what is no JSON object, as it is."""
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        found = text
    if not isinstance(found, dict):
        return (("", str(found)),)
    return tuple((name, _short(value)) for name, value in found.items())


def _short(value: object) -> str:
    """Returns a value, a digest cut to what one compares by eye."""
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:SHORT_DIGEST]}…" if _DIGEST.fullmatch(text) else text
