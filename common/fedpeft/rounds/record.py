"""The record of a committed round: what was folded, by which rule, and what came of it. Pure.

A record is canonical JSON: keys sorted, no spaces, ASCII, numbers as Python's `repr` writes them. It holds the digest
of the record before, so whoever holds the last digest can tell that nothing in a run's history was changed, and whoever
holds the updates can fold them again to the same bits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from fedpeft.adapters.spec import Section
from fedpeft.errors import BlobCorrupt
from fedpeft.privacy.events import Event
from fedpeft.rounds.screening import NormBound

PLAIN, PARTLY, FULL, SUM = 1, 2, 3, 4
"""Format 1 has no keys but those of a round of which everything was folded; 2 is for the others, 3 for rounds with a
stale update, sections beside the adapter, or events; 4 for rounds that made a sum."""
_OPTIONAL = ("excluded", "bound", "rolled_back_to", "sections", "events", "sum_sha256")
"""Keys that a record has only where there is something to say."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Contributed:
    """One update that was folded.

    Attributes:
        client: The client's id.
        ticket: The ticket it was sent for.
        examples: Examples it was trained on.
        weight: The strategy's weight of the update, not normalised: the factor that enters the fold.
        sha256: Digest of the payload, hexadecimal.
        staleness: Versions made since the one that it starts from, which is the one before the round if this is 0; a
            key only where it is not.
    """

    client: str
    ticket: str
    examples: int
    weight: float
    sha256: str
    staleness: int = 0


@dataclass(frozen=True, slots=True)
class Excluded:
    """One update that was received and not folded.

    Attributes:
        client: The client's id.
        ticket: The ticket it was sent for.
        examples: Examples it was trained on.
        norm: Euclidean norm of the decoded update.
        sha256: Digest of the payload, hexadecimal.
        reason: `norm` (above the round's limit) or `overflow` (the result would leave the range of float32).
    """

    client: str
    ticket: str
    examples: int
    norm: float
    sha256: str
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """One committed round.

    Attributes:
        run: Id of the run.
        round: Number of the round, 1, 2, ...; the result is adapter version `round`.
        base_sha256: Digest of the adapter file before, from which the updates started that are not stale.
        contributions: Folded updates, sorted by client.
        strategy: Name of the aggregation strategy.
        options: All its options, defaults included.
        adapter_sha256: Digest of the resulting adapter file; empty if the round made a sum.
        state_sha256: Digest of the resulting server-state file; empty if the strategy has none.
        previous_sha256: Digest of the record before; empty for round 1.
        excluded: Updates that were received and not folded, sorted by client.
        bound: The limit of the norms; only where something was excluded, and the run has one.
        sections: The sections beside the adapter, sorted by name, each with its divisor and encoding.
        events: Events of the folded updates; see `fedpeft.privacy.events`.
        rolled_back_to: The version whose tensors and state this one has, where nothing was folded; else None.
        sum_sha256: Digest of the payload of the sum, which the round made for a parent's server; else empty.
    """

    run: str
    round: int
    base_sha256: str
    contributions: tuple[Contributed, ...]
    strategy: str
    options: Mapping[str, JsonValue]
    adapter_sha256: str
    state_sha256: str
    previous_sha256: str
    excluded: tuple[Excluded, ...] = ()
    bound: NormBound | None = None
    rolled_back_to: int | None = None
    sections: tuple[Section, ...] = ()
    events: tuple[Event, ...] = ()
    sum_sha256: str = ""

    def to_json(self) -> str:
        """Returns the canonical JSON."""
        data = asdict(self)
        unsaid = [key for key in _OPTIONAL if data[key] in (None, (), "")]
        form = PLAIN if len(unsaid) == len(_OPTIONAL) else PARTLY
        if self.sections or self.events:
            form = FULL
        for contribution in data["contributions"]:
            if contribution["staleness"]:
                form = FULL
            else:
                del contribution["staleness"]
        form = SUM if self.sum_sha256 else form
        return json.dumps(
            {"format": form, **{key: value for key, value in data.items() if key not in unsaid}},
            sort_keys=True,
            separators=(",", ":"),
            allow_nan=False,
        )


_RECORD = TypeAdapter(Record)


def digest(record_json: str) -> str:
    """Returns the SHA-256 of a record's JSON, hexadecimal."""
    return hashlib.sha256(record_json.encode()).hexdigest()


def parse(record_json: str) -> Record:
    """Reads a record.

    Raises:
        BlobCorrupt: If it is not one in canonical form.
    """
    try:
        data: dict[str, Any] = json.loads(record_json)
        form = data.pop("format")
        record = _RECORD.validate_python(data, strict=False)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        fault = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise BlobCorrupt(f"this is not the record of a round: {fault}") from None
    if form not in (PLAIN, PARTLY, FULL, SUM):
        raise BlobCorrupt(f"the record has format {form!r}; this version reads {PLAIN} to {SUM}")
    if record.to_json() != record_json:
        raise BlobCorrupt(f"the record of round {record.round} is not in canonical form")
    return record


def ledger(records: Iterable[Record]) -> list[tuple[int, Event]]:
    """Returns the events of a run, each with its round, in order: what an accountant folds over."""
    return [(record.round, event) for record in records for event in record.events]


def verify_chain(records: Sequence[str]) -> None:
    """Checks that records are those of rounds 1, 2, ... of one run, each built on the one before.

    Rounds that made a sum for a parent's server start from versions that are supplied, and some numbers are missing:
    those of the parent's rounds without them.

    That the last one is the right one only its own digest, kept elsewhere, can say.

    Args:
        records: Canonical JSON, oldest first.

    Raises:
        BlobCorrupt: With the first round that does not fit and why.
    """
    before: Record | None = None
    previous = ""
    for place, text in enumerate(records, 1):
        record = parse(text)
        fault = _fault(record, record.round if record.sum_sha256 else place, previous, before)
        if fault:
            raise BlobCorrupt(f"record {place} of {len(records)}: {fault}")
        before, previous = record, digest(text)


def _fault(record: Record, number: int, previous: str, before: Record | None) -> str:
    """Returns what is wrong with a record at its place in the chain, or nothing."""
    clients = [contributed.client for contributed in record.contributions]
    left_out = [excluded.client for excluded in record.excluded]
    received = [c.sha256 for c in record.contributions] + [e.sha256 for e in record.excluded]
    digests = [record.base_sha256, record.sum_sha256 or record.adapter_sha256, *received]
    digests += [d for d in (record.state_sha256, record.previous_sha256) if d]
    faults = {
        f"it is of round {record.round}": record.round != number,
        f"its previous_sha256 is not {previous or 'empty'}": record.previous_sha256 != previous,
        "no update was folded": not clients and record.rolled_back_to is None,
        "it has both a sum and a version": bool(record.sum_sha256 and record.adapter_sha256),
        "it folds updates and goes back to a version": bool(received) and record.rolled_back_to is not None,
        f"it goes back to version {record.rolled_back_to}": not 0 <= (record.rolled_back_to or 0) < number,
        "its clients are not sorted, each once": clients != sorted(set(clients)) or left_out != sorted(set(left_out)),
        "a client's update is both folded and excluded": not set(clients).isdisjoint(left_out),
        "an update is excluded for a norm within the limit": any(
            e.reason == "norm" and (record.bound is None or e.norm <= record.bound.limit) for e in record.excluded
        ),
        "an event is of other updates than were folded": any(event.count != len(clients) for event in record.events),
        "an update starts from a version that never was": any(
            not 0 <= c.staleness < record.round for c in record.contributions
        ),
        "a digest has not 64 hexadecimal digits": not all(map(_DIGEST.fullmatch, digests)),
        "a weight or an example count is not positive": any(
            c.weight <= 0 or c.examples < 1 for c in record.contributions
        ),
    }
    if before is not None:
        faults |= {
            f"it is of run {record.run}, not {before.run}": record.run != before.run,
            f"it is of round {record.round}, and the one before of round {before.round}": record.round <= before.round,
            "it makes a sum where others make a version, or a version where others make a sum": bool(record.sum_sha256)
            != bool(before.sum_sha256),
            "it does not start from the adapter of the record before": not record.sum_sha256
            and record.base_sha256 != before.adapter_sha256,
        }
    return next((text for text, wrong in faults.items() if wrong), "")
