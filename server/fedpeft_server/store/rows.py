"""Rows of the database as frozen values. Times are seconds since the epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig, TrainingConfig
from fedpeft.identity.audit import Detail
from fedpeft.identity.subject import Subject
from fedpeft.privacy.events import Event
from fedpeft.rounds.commit import Outcome
from fedpeft.rounds.conduct import GOOD, Conduct
from fedpeft.rounds.screening import Extent, local_steps
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket
from fedpeft.rounds.transitions import Changes
from fedpeft.rounds.transitions import RunState as RunState

FOUND = "; the server found: "
"""Stands in the reason of a run or a ticket before what sites are not told: it names places of the server."""


def for_sites(reason: str) -> str:
    """Returns a reason as sites are told it."""
    return reason.partition(FOUND)[0]


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run.

    Attributes:
        id: `run-` and 12 lower-case letters and digits.
        config: As created, defaults filled in.
        spec: Every tuned tensor.
        backbone_fingerprint: SHA-256 of the frozen tensors, 64 hexadecimal digits.
        state: State of the run.
        reason: Reason of that state, in a sentence; may be empty.
        version: Newest committed adapter version; 0 is the adapter the run was created with.
        created_at: Time at which CreateRun was accepted.
        model_parameters: Parameters of the whole model; 0 if the creator did not say.
        request_id: The caller's id of the CreateRun call; may be empty.
        request_digest: Digest of what that call asked for; may be empty.
        revision: Number of transitions so far; counted from the milliseconds of `created_at` where it is relayed, so
            that no transition of an earlier run with its id fits it.
        relay: Client of the parent's server for which it is relayed; empty for all others.
    """

    id: str
    config: RunConfig
    spec: AdapterSpec
    backbone_fingerprint: str
    state: RunState
    reason: str
    version: int
    created_at: float
    model_parameters: int = 0
    request_id: str = ""
    request_digest: str = ""
    revision: int = 0
    relay: str = ""

    @property
    def for_sites(self) -> RunRow:
        """The run as sites are told of it."""
        return replace(self, reason=for_sites(self.reason)) if FOUND in self.reason else self


class FileState(StrEnum):
    """State of a version's files."""

    KEPT = ""
    """There, and not decided on yet, or kept for good."""
    HELD = "held"
    """There for a reason that may pass: it is the best, or a ticket starts from it."""
    REMOVING = "removing"
    """About to be removed; nobody is given the version any more."""
    REMOVED = "removed"
    """Removed; the row and the round's record stay."""


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A stored adapter version. Digests are hexadecimal; `state_sha256` is empty if the strategy keeps no state.

    `source` is the earlier version that a rollback made it of; None for all others. `draw` names the file of a fold
    that may come to others than another fold of its round, or of a version of a parent's run; empty for all others.
    `retention` says whether its files are there.
    """

    run: str
    version: int
    sha256: str
    size_bytes: int
    state_sha256: str
    created_at: float
    source: int | None = None
    draw: str = ""
    retention: FileState = FileState.KEPT

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> VersionRow:
        """Returns the version of a row of the table."""
        return cls(**{**row, "retention": FileState(row["retention"])})

    @property
    def has_files(self) -> bool:
        """True if its files are there, and are not about to be removed."""
        return self.retention in (FileState.KEPT, FileState.HELD)


@dataclass(frozen=True, slots=True)
class UpdateRow:
    """A received update of a ticket; `norm` is the Euclidean one of the decoded update."""

    ticket: str
    examples: int
    norm: float
    metrics: Mapping[str, float]
    manifest: Manifest
    received_at: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes between the server and one client, as whole messages (wire) and as encoded tensors (payload)."""

    wire_up: int = 0
    wire_down: int = 0
    payload_up: int = 0
    payload_down: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.wire_up + other.wire_up,
            self.wire_down + other.wire_down,
            self.payload_up + other.payload_up,
            self.payload_down + other.payload_down,
        )

    def at_least(self, payload_up: int = 0, payload_down: int = 0) -> Traffic:
        """Returns these bytes with the payloads raised where they are less, and the wire to those."""
        return self + self.short_of(payload_up, payload_down)

    def short_of(self, payload_up: int = 0, payload_down: int = 0) -> Traffic:
        """Returns what these bytes lack of such payloads, and what the wire then lacks.

        A chunk is on the wire before it is a payload: a process that was killed may have written the one of both.
        """
        up, down = max(0, payload_up - self.payload_up), max(0, payload_down - self.payload_down)
        wire_up, wire_down = self.payload_up + up - self.wire_up, self.payload_down + down - self.wire_down
        return Traffic(max(0, wire_up), max(0, wire_down), up, down)


@dataclass(frozen=True, slots=True)
class Result:
    """A folded round.

    Attributes:
        outcome: The result of folding.
        at: Time at which it was stored.
        version: The row of the stored version; None if the round made a sum.
    """

    outcome: Outcome
    at: float
    version: VersionRow | None


class RevisionMoved(Exception):
    """A transition was not written: another process changed the run since it was read. Its actor decides anew."""


class LeaseLost(Exception):
    """A fold was not committed: another daemon has taken the lease of its run, and folds the round itself."""


@dataclass(frozen=True, slots=True)
class Transition:
    """A transition of a run with all that is written together with it.

    Attributes:
        changes: Changes of the run, its round and its tickets.
        updates: Received updates of some of them.
        result: The result of the round that the transition commits, if it commits one.
        supplied: The version of a parent's server that the transition begins with, if it is that.
        conducts: Use that clients made of their tickets, as far as it changed.
        audit_events: Entries for the audit log.
        epoch: Epoch of the lease by which its round was folded; 0 where none is needed.
    """

    changes: Changes
    updates: Sequence[UpdateRow] = ()
    result: Result | None = None
    supplied: VersionRow | None = None
    conducts: Mapping[str, Conduct] = field(default_factory=dict)
    audit_events: Sequence[AuditEvent] = ()
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class FoldInputs:
    """The inputs of a round's fold.

    Attributes:
        updates: Received updates, by ticket.
        base: The version that the clients started from.
        previous_sha256: Digest of the record before, hexadecimal; empty for the first round.
        norms: Norm and examples of the updates that count in earlier rounds, by round number.
        ledger: Events of all rounds before, oldest first.
        figures: Of the newest committed round before; empty for the first round.
    """

    updates: Mapping[str, UpdateRow]
    base: VersionRow
    previous_sha256: str
    norms: Mapping[int, Sequence[tuple[float, int]]]
    ledger: Sequence[Event]
    figures: Mapping[str, float]

    def extents(self, number: int, training: TrainingConfig) -> list[Extent]:
        """Returns the extents of the updates that count in an earlier round; see `fedpeft.rounds.screening`."""
        return [Extent(norm, local_steps(examples, training)) for norm, examples in self.norms.get(number, ())]


@dataclass(frozen=True, slots=True)
class Place:
    """Place up to which rounds were read: all up to number `after`, and of the one after it the tickets up to `client`.

    Before its tickets comes its record, of which `record` characters were read; where there is a client, all of them.
    """

    after: int = 0
    client: str = ""
    record: int = 0


@dataclass(frozen=True, slots=True)
class TicketFigures:
    """A ticket as it is shown.

    Attributes:
        ticket: Its state.
        traffic: Bytes between its client and the server in its round.
        weight: Share in the mean; 0 until committed.
        examples: Of its update; 0 until received.
        norm: Euclidean norm of its update; 0 until received.
        metrics: Training figures that came with it.
        payload_sha256: Digest of its update, hexadecimal; empty until received.
    """

    ticket: Ticket
    traffic: Traffic
    weight: float = 0.0
    examples: int = 0
    norm: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    payload_sha256: str = ""


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """A round as it is shown, with some of its tickets or all.

    Attributes:
        round: Its state; the tickets in it are those that were read.
        committed_at: Time at which version `round.number` was committed.
        record: The record of the committed round, canonical JSON, or what was read of it; empty until committed.
        record_offset: Number of characters of it before the part that was read.
        record_sha256: Its digest, hexadecimal; empty until committed.
        metrics: Figures of the round and of the version it made.
        traffic: Sum over all its tickets, whether read or not; evaluators' bytes are in Prometheus' counters only.
        tickets: Those that were read, in client-id order.
    """

    round: Round
    committed_at: float | None = None
    record: str = ""
    record_offset: int = 0
    record_sha256: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    tickets: tuple[TicketFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class GaugeSnapshot:
    """Values of the gauges of a run.

    Attributes:
        scored: By split, the figures that came last.
        metrics: Figures of the last committed round.
        current: Bytes of the round in progress.
        last: Bytes of the last committed round.
    """

    scored: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float]
    current: Traffic
    last: Traffic


@dataclass(frozen=True, slots=True)
class ClientRow:
    """A client that registered.

    Attributes:
        id: Its id.
        instance: State directory that holds the id.
        role: trainer or evaluator.
        capabilities: The serialised message.
        first_seen: Time of its first registration.
        last_seen: Time of its last call.
        updates: Number of its updates.
        process: The process that registered last; empty if it did not say.
        follows: Of one that registers: the instance and process that the database had as that was judged, both empty
            if it had none; None where no other server writes.
    """

    id: str
    instance: str
    role: str
    capabilities: bytes
    first_seen: float
    last_seen: float
    updates: int = 0
    process: str = ""
    follows: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A client's answer to the offer of a run.

    Attributes:
        run: The run.
        client: The client.
        accepted: True if it takes part.
        reasons: Reasons against it, a sentence each; empty if it takes part.
        examples: Examples it has of the run's classes; 0 if it did not say.
        at: Time of the answer.
        conduct: Use that it made of its last tickets of the run.
    """

    run: str
    client: str
    accepted: bool
    reasons: tuple[str, ...] = ()
    examples: int = 0
    at: float = 0.0
    conduct: Conduct = GOOD


@dataclass(frozen=True, slots=True)
class FailedEvaluation:
    """A version of a run that an evaluator could not score; `reason` is what it said of it, `at` when."""

    run: str
    version: int
    evaluator: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class TicketRow:
    """A ticket with the run that it is for."""

    run: str
    ticket: Ticket


SERVER = "server"
"""The actor of what nobody asked for, in the audit log."""


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """An event for the audit log: an entry before it has its number there.

    Attributes:
        actor: `ROLE NAME`, `local` for plain text, or `server`.
        action: The action, for example `run.created`.
        object: To what; may be empty.
        details: More of it.
    """

    actor: str
    action: str
    object: str = ""
    details: Mapping[str, Detail] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenRow:
    """An enrolment token; `used_at` is None and `key_sha256` empty until it was used."""

    ID_DIGITS: ClassVar[int] = 12

    secret_sha256: str
    subject: Subject
    created_at: float
    created_by: str
    expires_at: float
    used_at: float | None = None
    key_sha256: str = ""

    @property
    def id(self) -> str:
        """Its name for people."""
        return self.secret_sha256[: self.ID_DIGITS]


@dataclass(frozen=True, slots=True)
class IdentityRow:
    """A subject that was enrolled, or that has called.

    Attributes:
        subject: Its role and name.
        issued_at: Time at which its newest certificate was issued; None if this server issued none.
        expires_at: End of that one.
        fingerprint: Of that one; may be empty.
        revoked_at: Time of its last revocation; None: never.
        reason: Reason for it; may be empty.
        restored_at: Time at which it was admitted again after that; None while it is refused.
        issuer: Fingerprint of the authority that issued its newest certificate; may be empty.
    """

    subject: Subject
    issued_at: float | None = None
    expires_at: float | None = None
    fingerprint: str = ""
    revoked_at: float | None = None
    reason: str = ""
    restored_at: float | None = None
    issuer: str = ""

    @property
    def is_revoked(self) -> bool:
        """True if it is refused with any certificate."""
        return self.revoked_at is not None and self.restored_at is None

    @property
    def refused_until(self) -> float:
        """Certificates that begin at this time or before are refused; infinite while all are."""
        if self.revoked_at is None:
            return -math.inf
        return math.inf if self.restored_at is None else self.restored_at
