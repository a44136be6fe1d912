"""Tickets of a round: found by id or by client, and counted by state, without looking at all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice

from fedpeft.errors import TicketClosed
from fedpeft.untrusted_text import in_short

_BLOCK = 256
"""Tickets that are compared at once."""
EXPLAINED = 3
"""Withdrawn tickets of which it is said why."""


class TicketState(StrEnum):
    """State of a client's right to contribute."""

    ISSUED = "issued"
    RECEIVED = "received"
    WITHDRAWN = "withdrawn"
    REFUSED = "refused"
    LATE = "late"


@dataclass(frozen=True, slots=True)
class Ticket:
    """A client's right to contribute one update.

    Attributes:
        id: See `ticket_id`.
        client: The client's id.
        state: Its state.
        reason: Reason for which it is no longer good, if it is not, or was given out again.
        generation: The round's extensions when it was issued, 0 for all once it was resumed; -1 for those that had been
            given back by then.
        base_version: The adapter version that its update starts from.
        issued_at: Time at which it was given out, seconds since the epoch.
    """

    id: str
    client: str
    state: TicketState = TicketState.ISSUED
    reason: str = ""
    generation: int = 0
    base_version: int = 0
    issued_at: float = 0.0

    @property
    def issued_in(self) -> int:
        """Number of the round that it was issued in, which chooses the seed and the roles of the tensors."""
        return round_from(self.base_version)

    def check_not_closed(self) -> None:
        """Checks that it was not closed before its round was: one that is LATE passes.

        Raises:
            TicketClosed: If it was withdrawn or refused.
        """
        if self.state in (TicketState.WITHDRAWN, TicketState.REFUSED):
            raise TicketClosed(f"ticket {self.id} was {self.state}: {self.reason or 'no reason given'}")


def round_from(version: int) -> int:
    """Returns the number of the round whose tickets start from a version: the one that follows it."""
    return version + 1


class Tickets(tuple[Ticket, ...]):
    """Tickets in client-id order, one a client.

    The index of the ids is made at the first search. Where one ticket changes, all keep their places, so the tickets
    after the change share it.
    """

    def find(self, ticket_id: str) -> Ticket | None:
        """Returns the ticket of an id; None if there is none."""
        place = self._places.get(ticket_id)
        return None if place is None else self[place]

    def of_client(self, client: str) -> Ticket | None:
        """Returns the ticket of a client; None if there is none."""
        place = bisect_left(self, client, key=lambda ticket: ticket.client)
        found = self[place] if place < len(self) else None
        return found if found is not None and found.client == client else None

    def number(self, state: TicketState) -> int:
        """Returns how many tickets are in a state."""
        return sum(count for (each, _), count in self._counts.items() if each is state)

    def number_of_generation(self, state: TicketState, generation: int) -> int:
        """Returns how many tickets of a generation are in a state."""
        return self._counts[state, generation]

    def with_changed(self, ticket: Ticket) -> Tickets:
        """Returns all tickets, with this one in place of the one with its id.

        Raises:
            KeyError: If there is none with that id.
        """
        place = self._places[ticket.id]
        changed = list(self)
        counts = self._counts.copy()
        counts[_kind(self[place])] -= 1
        counts[_kind(ticket)] += 1
        changed[place] = ticket
        after = Tickets(changed)
        after.__dict__.update(_places=self._places, _counts=counts)
        return after

    def has_gained(self, before: Tickets) -> bool:
        """Returns False if every ticket was in `before` too, in whatever state; True if some may be new."""
        return self._places is not before._places

    def changes_since(self, before: Tickets) -> Iterator[tuple[Ticket | None, Ticket]]:
        """Yields each ticket that differs from the one of its id before (None: there was none) with that one first.

        Tickets are never lost, so as many as before are the same ones.
        """
        if len(self) != len(before):
            yield from ((old, new) for new in self if (old := before.find(new.id)) != new)
            return
        for start in range(0, len(self), _BLOCK):
            here = slice(start, start + _BLOCK)
            if before[here] != self[here]:  # most are the same objects, which a comparison of tuples passes over
                pairs = zip(before[here], self[here], strict=True)
                yield from ((old, new) for old, new in pairs if old is not new and old != new)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {ticket.id: place for place, ticket in enumerate(self)}

    @cached_property
    def _counts(self) -> Counter[tuple[TicketState, int]]:
        return Counter(map(_kind, self))


def _kind(ticket: Ticket) -> tuple[TicketState, int]:
    return ticket.state, ticket.generation


def withdrawals(tickets: Tickets) -> str:
    """Returns what follows a sentence on a round: whose tickets were withdrawn, and why; empty if there is none."""
    number = tickets.number(TicketState.WITHDRAWN)
    some = islice((each for each in tickets if each.state is TicketState.WITHDRAWN), EXPLAINED) if number else ()
    said = [
        f"; the ticket of {each.client} was withdrawn: {in_short(each.reason) or 'no reason given'}" for each in some
    ]
    return "".join(said) + (f"; and of {number - EXPLAINED} more" if number > EXPLAINED else "")
