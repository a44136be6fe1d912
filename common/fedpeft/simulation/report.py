"""The report of a simulation: what `fedpeft run show --json` says of a run that a server held.

Notable: the keys are the same; nothing was sent, so `wire_bytes_up` and `wire_bytes_down` are None. Payload bytes are
those that a server would book: a client that holds the adapter's bytes already gets none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from fedpeft.adapters.payload import Manifest
from fedpeft.privacy.events import Event
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import Ticket, TicketState

Json = dict[str, Any]

BYTES_PER_PARAMETER = 4
"""Float32: what a parameter costs one way where nothing is encoded."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A counted update.

    Attributes:
        examples: Images it was trained on.
        norm: Euclidean norm of the decoded update.
        manifest: Description of its payload.
        metrics: The client's training figures.
    """

    examples: int
    norm: float
    manifest: Manifest
    metrics: Mapping[str, float]


@dataclass
class RoundBook:
    """Notes on a round while it is held.

    Attributes:
        round: State of the round.
        arrivals: Counted updates by ticket.
        up: Payload bytes by client.
        down: Likewise.
        weights: Share in the mean by ticket, once folded.
        metrics: Figures of the result.
        committed_at: Seconds since the epoch.
        record_sha256: Digest of its record.
        excluded: Reasons of exclusions, by ticket.
        events: Of its record.
    """

    round: Round
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    committed_at: float | None = None
    record_sha256: str = ""
    excluded: Mapping[str, str] = field(default_factory=dict)
    events: tuple[Event, ...] = ()

    @property
    def counted(self) -> list[tuple[Ticket, Arrival]]:
        """The updates that count, in client-id order."""
        return [(ticket, self.arrivals[ticket.id]) for ticket in self.round.in_state(TicketState.RECEIVED)]


def round_json(book: RoundBook, model_parameters: int) -> Json:
    """Returns a committed round."""
    current, clients = book.round, _clients(book.round, TicketState.RECEIVED)
    opened, committed = current.opened_at, book.committed_at
    return {
        "version": current.number,
        "clients": clients,
        **_bytes(book, [t.client for t in current.tickets]),
        "full_bytes_each_way": model_parameters * BYTES_PER_PARAMETER * len(clients),
        "metrics": dict(sorted(book.metrics.items())),
        "tickets": [_ticket(book, ticket) for ticket in current.tickets],
        "extensions": current.extensions,
        "opened_at": moment(opened),
        "committed_at": moment(committed),
        "seconds": None if opened is None or committed is None else round(committed - opened, 3),
        "record_sha256": book.record_sha256,
        **({"events": [asdict(event) for event in book.events]} if book.events else {}),
    }


def progress_json(book: RoundBook) -> Json:
    """Returns the round that a paused simulation ended in."""
    current = book.round
    return {
        "round": current.number,
        "phase": str(Phase(current.phase)),
        "base_version": current.base_version,
        "awaited": _clients(current, TicketState.ISSUED),
        "received": _clients(current, TicketState.RECEIVED),
        "opened_at": moment(current.opened_at),
        "deadline": moment(current.deadline),
        "extensions": current.extensions,
        **_bytes(book, [t.client for t in current.tickets]),
        "tickets": [_ticket(book, ticket) for ticket in current.tickets],
    }


def moment(seconds: float | None) -> str | None:
    """Returns a time as ISO 8601 in UTC, or None where none is set."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _ticket(book: RoundBook, ticket: Ticket) -> Json:
    arrival = book.arrivals.get(ticket.id)
    return {
        "ticket": ticket.id,
        "client": ticket.client,
        "state": str(TicketState(ticket.state)),
        "reason": ticket.reason,
        "staleness": book.round.staleness(ticket),
        "examples": arrival.examples if arrival else 0,
        "weight": book.weights.get(ticket.id, 0.0),
        "update_norm": arrival.norm if arrival else 0.0,
        "payload_sha256": arrival.manifest.sha256.hex() if arrival else "",
        **_bytes(book, [ticket.client]),
        "metrics": dict(sorted(arrival.metrics.items())) if arrival else {},
    }


def _clients(current: Round, state: TicketState) -> list[str]:
    return [ticket.client for ticket in current.in_state(state)]


def _bytes(book: RoundBook, clients: Iterable[str]) -> Json:
    clients = list(clients)
    return {
        "wire_bytes_up": None,
        "wire_bytes_down": None,
        "payload_bytes_up": sum(book.up.get(client, 0) for client in clients),
        "payload_bytes_down": sum(book.down.get(client, 0) for client in clients),
    }
