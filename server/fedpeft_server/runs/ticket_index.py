"""Run of each ticket of a round in progress, so that a call about a ticket looks at one round and not at all."""

from __future__ import annotations

from fedpeft.errors import TicketNotFound
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState
from fedpeft_server.store.store import Store

NONE = Tickets()


class TicketIndex:
    """Runs by the tickets of their rounds in progress."""

    def __init__(self) -> None:
        self._runs: dict[str, str] = {}
        self._indexed: dict[str, Tickets] = {}  # by run: those of its round

    def run_of(self, ticket: str) -> str | None:
        """Returns the run of a ticket; None if no round in progress has it."""
        return self._runs.get(ticket)

    def follow(self, current: Round) -> None:
        """Indexes the tickets of a run's round in progress, if they are not the ones that are indexed."""
        if not current.tickets.has_gained(self._indexed.get(current.run, NONE)):
            return
        self.forget(current.run)
        self._indexed[current.run] = current.tickets
        self._runs.update((ticket.id, current.run) for ticket in current.tickets)

    def forget(self, run: str) -> None:
        """Drops the tickets of a run that has no round in progress any more."""
        for ticket in self._indexed.pop(run, NONE):
            del self._runs[ticket.id]


async def is_closed_elsewhere(ticket: Ticket, store: Store) -> bool:
    """Returns True if another daemon has closed a ticket that is open by what this one knows.

    Its word that it has the update may be on the way: a client that was given the ticket again would take its receipt
    for lost.
    """
    if not store.db.is_shared:
        return False
    try:
        return (await store.transact(store.db.ticket, ticket.id)).ticket.state is not TicketState.ISSUED
    except TicketNotFound:  # the run was deleted
        return True
