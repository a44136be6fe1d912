"""Rounds and tickets as the console keeps them: plain values, read once from the protocol's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.errors import UpdateExcluded
from fedpeft.formatting import counted
from fedpeft.rounds.metric_values import ROLLED_BACK_TO
from fedpeft.rounds.state_machine import ROLLBACK_REASON
from fedpeft.v1 import run_pb2


@dataclass(frozen=True, slots=True)
class TicketFacts:
    """A client's part in one round.

    Attributes:
        client: Its id.
        state: issued, received, withdrawn, refused or late; of a refused one, excluded if its update was not folded
            because of its norm, and discarded if a rollback ended its round.
        reason: Reason, where the state wants one.
        examples: Trained on, as the client says.
        weight: Share of the mean; 0 until committed.
        norm: Euclidean norm of the update; 0 until received.
        loss: Of local training, in nats.
        up: Bytes from the client, whole messages.
        down: Bytes to it.
        staleness: Versions made since the one that its update starts from.
    """

    client: str
    state: str
    reason: str
    examples: int
    weight: float
    norm: float
    loss: float | None
    up: int
    down: int
    staleness: int = 0

    @property
    def words(self) -> str:
        """The client, with how many versions it is behind, if it is."""
        return f"{self.client} ({counted(self.staleness, 'version')} behind)" if self.staleness else self.client

    @property
    def is_counted(self) -> bool:
        """True if its update is part of the round."""
        return self.state == "received"


@dataclass(frozen=True)
class RoundFacts:
    """One round; sizes in bytes, times in seconds or ISO 8601.

    Attributes:
        number: 1, 2, ...
        phase: waiting, open, aggregating or committed.
        opened_at: Time at which tickets were first given out.
        deadline: Its deadline.
        committed_at: Time of its commit.
        seconds: From the first ticket to the version.
        extensions: Deadlines missed.
        tickets: By client id.
        metrics: Figures of its version.
        up: Whole messages from clients.
        down: Whole messages to them.
        payload_up: Tensors alone.
        payload_down: Tensors alone.
        full: Bytes that full fine-tuning would have sent each way for the updates counted; 0 if not known.
        record_sha256: Digest of its record.
        rolled_back_to: The version whose tensors its version has, where a rollback made it; else None.
    """

    number: int
    phase: str
    opened_at: str | None
    deadline: str | None
    committed_at: str | None
    seconds: float | None
    extensions: int
    tickets: tuple[TicketFacts, ...]
    metrics: Mapping[str, float]
    up: int
    down: int
    payload_up: int
    payload_down: int
    full: int
    record_sha256: str
    rolled_back_to: int | None = None

    @property
    def is_committed(self) -> bool:
        """True if its version is final."""
        return self.phase == "committed"

    @cached_property
    def by_state(self) -> dict[str, tuple[TicketFacts, ...]]:
        """The tickets by their state."""
        found: dict[str, list[TicketFacts]] = {}
        for ticket in self.tickets:
            found.setdefault(ticket.state, []).append(ticket)
        return {state: tuple(tickets) for state, tickets in found.items()}

    def of(self, state: str) -> tuple[TicketFacts, ...]:
        """Returns the tickets of one state."""
        return self.by_state.get(state, ())


class Reader:
    """Reads the rounds of one run, each as often as it has changed."""

    def __init__(self) -> None:
        self._read: dict[int, tuple[run_pb2.Round, RoundFacts]] = {}

    def rounds(self, snapshot: RunSnapshot) -> list[RoundFacts]:
        """Returns all rounds of a snapshot, by number."""
        for number, message in snapshot.rounds.items():
            known = self._read.get(number)
            if known is None or known[0] is not message:
                self._read[number] = message, round_facts(message, snapshot.run)
        return [self._read[number][1] for number in sorted(snapshot.rounds)]


def round_facts(message: run_pb2.Round, run: run_pb2.Run) -> RoundFacts:
    """Reads a round."""
    back = int(message.metrics[ROLLED_BACK_TO]) if ROLLED_BACK_TO in message.metrics else None
    tickets = tuple(_ticket_facts(ticket, message, rolled_back=back is not None) for ticket in message.tickets)
    return RoundFacts(
        number=message.number,
        phase=views.phase(message),
        opened_at=views.moment(message.opened_at),
        deadline=views.moment(message.deadline),
        committed_at=views.moment(message.committed_at),
        seconds=views.seconds(message),
        extensions=message.extensions,
        tickets=tickets,
        metrics={name: value for name, value in message.metrics.items() if name != ROLLED_BACK_TO},
        up=message.wire_bytes_up,
        down=message.wire_bytes_down,
        payload_up=message.payload_bytes_up,
        payload_down=message.payload_bytes_down,
        full=views.full_bytes(run, sum(ticket.is_counted for ticket in tickets)),
        record_sha256=message.record_sha256,
        rolled_back_to=back,
    )


def _ticket_facts(ticket: run_pb2.Ticket, round_: run_pb2.Round, *, rolled_back: bool) -> TicketFacts:
    state = run_pb2.TicketState.Name(ticket.state).removeprefix("TICKET_STATE_").lower()
    if state == "refused" and ticket.reason.startswith(UpdateExcluded.reason):
        state = "excluded"
    elif state == "refused" and rolled_back and ticket.reason.startswith(ROLLBACK_REASON):
        state = "discarded"
    return TicketFacts(
        client=ticket.client,
        state=state,
        reason=ticket.reason.removeprefix(f"{UpdateExcluded.reason}: "),
        examples=ticket.examples,
        weight=ticket.weight,
        norm=ticket.update_norm,
        loss=ticket.metrics.get("loss"),
        up=ticket.wire_bytes_up,
        down=ticket.wire_bytes_down,
        staleness=views.staleness(ticket, round_),
    )
