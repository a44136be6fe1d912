"""The audit log as a chain: what an entry is, how its digest comes about, and whether a log is whole. Pure.

An entry's line is canonical JSON: keys sorted, no spaces, ASCII, numbers as Python's `repr` writes them. Its `sha256`,
which sorts last, is that of the same JSON without it; `previous_sha256` is the one of the entry before. So no entry can
be changed, removed or put between two others without changing every later digest, and whoever noted one of them can
tell. That the newest entries were not cut off, only a digest that was noted can say.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedpeft.errors import AuditBroken

FIRST = "0" * 64
"""Previous digest of the first entry."""
MAX_DETAILS = 4096
"""Characters of `details` at most."""
SHORT = 256
"""Characters that are left of a text where something was too long."""

Detail = str | int | float | bool | None

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TYPES = {
    "number": int,
    "at": float,
    "actor": str,
    "action": str,
    "object": str,
    "details": str,
    "previous_sha256": str,
    "sha256": str,
}


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the audit log.

    Attributes:
        number: 1 for the first, then without a gap.
        at: Time, in seconds since the epoch.
        actor: The one who did it: `ROLE NAME`, `local` or `server`.
        action: The action, for example `token.created`.
        object: To what; may be empty.
        details: More of it, canonical JSON of an object.
        previous_sha256: Digest of the entry before; `FIRST` for the first.
        sha256: Digest of this one.
    """

    number: int
    at: float
    actor: str
    action: str
    object: str
    details: str
    previous_sha256: str
    sha256: str

    def to_line(self) -> str:
        """Returns the canonical JSON of all of it, as an export has it."""
        return _canonical(asdict(self))


def entry(
    previous: AuditEntry | None, at: float, actor: str, action: str, object: str, details: Mapping[str, Detail]
) -> AuditEntry:
    """Returns the entry that comes after `previous`, or the first one.

    What is too long is shortened, never refused: that something happened must not stay out because of how long it is.
    """
    content: dict[str, Any] = {
        "number": previous.number + 1 if previous else 1,
        "at": float(at),
        "actor": _short(actor),
        "action": _short(action),
        "object": _short(object),
        "details": _details(details),
        "previous_sha256": previous.sha256 if previous else FIRST,
    }
    return AuditEntry(**content, sha256=_digest(content))


def of_line(text: str, where: str) -> AuditEntry:
    """Reads a line of an export.

    Args:
        text: The line.
        where: Name of the entry's place in an error, for example `line 7`.

    Raises:
        AuditBroken: If it is no entry in canonical form.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise AuditBroken(f"{where} is not JSON; an export has an entry a line") from None
    if not isinstance(content, dict) or {key: type(value) for key, value in content.items()} != _TYPES:
        raise AuditBroken(f"{where} is not an entry of an audit log: it must have {', '.join(_TYPES)}")
    found = AuditEntry(**content)
    if found.to_line() != text.strip():
        raise AuditBroken(f"{where} (entry {found.number}) is not in canonical form; it was edited")
    return found


def check(previous: AuditEntry | None, found: AuditEntry) -> None:
    """Checks that an entry is whole and the one after `previous`.

    Raises:
        AuditBroken: If it is not; the message names its number and what does not fit.
    """
    number = previous.number + 1 if previous else 1
    if found.number != number:
        raise AuditBroken(f"entry {number} is missing: entry {found.number} stands in its place")
    if found.previous_sha256 != (previous.sha256 if previous else FIRST):
        raise AuditBroken(f"entry {number} does not follow the entry before it: one of the two was replaced")
    content = asdict(found)
    content.pop("sha256")
    if _digest(content) != found.sha256:
        raise AuditBroken(f"entry {number} was changed: its content does not have its sha256")


def verify(entries: Iterable[AuditEntry], head: tuple[int, str] | None = None) -> AuditEntry | None:
    """Checks a whole log, from its first entry on.

    Args:
        entries: Oldest first.
        head: Number and digest of an entry, noted at some time: nothing up to it may have been rewritten since.

    Returns:
        The newest entry; None if there is none.

    Raises:
        AuditBroken: With the first number that is wrong.
    """
    last: AuditEntry | None = None
    for found in entries:
        check(last, found)
        check_head(found, head)
        last = found
    check_reached(last, head)
    return last


def check_head(found: AuditEntry, head: tuple[int, str] | None) -> None:
    """Checks an entry against what was noted of its number.

    Raises:
        AuditBroken: If it has another digest.
    """
    if head and found.number == head[0] and found.sha256 != head[1]:
        raise AuditBroken(
            f"entry {found.number} has sha256 {found.sha256}, but {head[1]} was noted: it or one before was rewritten"
        )


def check_reached(last: AuditEntry | None, head: tuple[int, str] | None) -> None:
    """Checks that a log goes as far as what was noted.

    Raises:
        AuditBroken: If it ends before.
    """
    length = last.number if last else 0
    if head and length < head[0]:
        raise AuditBroken(f"the log ends with entry {length}, but entry {head[0]} was noted: its end was cut off")


def parse_head(text: str) -> tuple[int, str]:
    """Reads NUMBER:SHA256.

    Raises:
        ValueError: If it is not of that form.
    """
    number, _, digest = text.partition(":")
    if not (number.isascii() and number.isdigit() and len(number) < 20 and int(number)) or not _DIGEST.fullmatch(
        digest
    ):
        raise ValueError(f"{text[:100]!r} is not NUMBER:SHA256, as `fedpeft audit verify` prints it")
    return int(number), digest


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _details(details: Mapping[str, Detail]) -> str:
    text = _canonical(details)
    if len(text) <= MAX_DETAILS:
        return text
    text = _canonical({key: _short(value) if isinstance(value, str) else value for key, value in details.items()})
    return text if len(text) <= MAX_DETAILS else _canonical({"too_long": len(text)})


def _short(text: str) -> str:
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"
