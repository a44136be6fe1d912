"""Run of each ticket of a round in progress, so that a call about a ticket looks at one round and not at all."""

from __future__ import annotations

from fedpeft.rounds.state_machine import Round


class TicketIndex:
    """Runs by the tickets of their rounds in progress."""

    def __init__(self) -> None:
        self._runs: dict[str, str] = {}
        self._indexed: dict[str, tuple[int, tuple[str, ...]]] = {}  # by run: number and tickets of its round

    def run_of(self, ticket: str) -> str | None:
        """Returns the run of a ticket; None if no round in progress has it."""
        return self._runs.get(ticket)

    def follow(self, current: Round) -> None:
        """Indexes the tickets of a run's round in progress, if they are not the ones that are indexed.

        A round only ever gains tickets, so its number and their count tell whether there are others.
        """
        number, tickets = self._indexed.get(current.run, (0, ()))
        if number == current.number and len(tickets) == len(current.tickets):
            return
        self.forget(current.run)
        tickets = tuple(ticket.id for ticket in current.tickets)
        self._indexed[current.run] = current.number, tickets
        self._runs.update(dict.fromkeys(tickets, current.run))

    def forget(self, run: str) -> None:
        """Drops the tickets of a run that has no round in progress any more."""
        _, tickets = self._indexed.pop(run, (0, ()))
        for ticket in tickets:
            del self._runs[ticket]
