"""Run of each ticket of a round in progress, so that a call about a ticket looks at one round and not at all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from fedpeft.errors import TicketNotFound
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState
from fedpeft_server.runs.engine import RunEngine
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


async def usable_ticket(
    engine: RunEngine, client: str, store: Store, follow: Callable[[str], Awaitable[None]]
) -> Ticket | None:
    """Returns the ticket of a run that a client can use now, by the database where other daemons write to it too.

    The word of another daemon may be on its way that it has the update: a client that was given its ticket again would
    take the receipt for lost.

    Args:
        engine: The run.
        client: The client.
        store: The database.
        follow: Takes up what another daemon has made of a run.
    """
    ticket = engine.open_ticket(client)
    if ticket is None or not store.db.is_shared:
        return ticket
    with suppress(TicketNotFound):
        if (await store.transact(store.db.ticket, ticket.id)).ticket.state is TicketState.ISSUED:
            return ticket
    await follow(engine.run.id)
    found = engine.open_ticket(client)
    return None if found is not None and found.id == ticket.id else found
