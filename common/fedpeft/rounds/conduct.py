"""Conduct: clients' use of their tickets, and what follows from it for sampling. Pure.

A client whose ticket brought no update is sampled after all others for a while: 4 rounds for each ticket in a row, at
most 64. One whose updates were refused or excluded three times in a row is set aside: it is sampled last of all, so
only for a round that could not be held without it, until an operator lets it back or an update of it counts. What is
kept is three numbers a client and run, changed when a round commits; clients that deliver keep zeros.

No ticket counts against a client that the round did not wait for: late because as many updates as were wanted had come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from fedpeft.config import RoundsConfig
from fedpeft.errors import UpdateExcluded
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket, TicketState

ASIDE_AFTER = 3
"""Updates in a row that are refused or excluded before a client is set aside."""
REST_ROUNDS = 4
"""Rounds for which a client is sampled last, for each ticket in a row that brought nothing."""
LONGEST_REST = 64
"""The most rounds of it."""
LAST_OF_ALL = 2**31 - 1
"""The demerit of a client that is set aside."""


@dataclass(frozen=True, slots=True)
class Conduct:
    """A client's use of its last tickets of a run.

    Attributes:
        missed: Tickets in a row that brought no update that counts.
        missed_in: Number of the round of the last of them.
        refused: Updates in a row that were refused or excluded.
    """

    missed: int = 0
    missed_in: int = 0
    refused: int = 0

    @property
    def is_aside(self) -> bool:
        """True if the client is set aside."""
        return self.refused >= ASIDE_AFTER

    def demerit(self, number: int) -> int:
        """Returns by how much the client is sampled after others in a round; 0 for one that is not."""
        if self.is_aside:
            return LAST_OF_ALL
        rests = number - self.missed_in <= min(REST_ROUNDS * self.missed, LONGEST_REST)
        return self.missed if self.missed and rests else 0


GOOD = Conduct()
"""That of a client of which nothing is known, or that delivered its last update."""


def settled(done: Round, config: RoundsConfig, known: Callable[[str], Conduct]) -> dict[str, Conduct]:
    """Returns what a committed round changes.

    Args:
        done: The round, committed.
        config: The run's rounds.
        known: Returns a client's conduct up to then.

    Returns:
        By client, the new conduct of those whose conduct changed.
    """
    met = sum(map(_arrived, done.tickets)) >= config.clients
    after = {ticket.client: _after(known(ticket.client), ticket, done.number, met=met) for ticket in done.tickets}
    return {client: conduct for client, conduct in after.items() if conduct != known(client)}


class Demerits(Mapping[str, int]):
    """The demerits of the clients that have one in a round; each is worked out when it is asked for.

    As a rule nobody is sampled, and then none is.

    Args:
        known: The conduct of clients; not copied.
        number: The round.
    """

    def __init__(self, known: Mapping[str, Conduct], number: int) -> None:
        self._known = known
        self._number = number

    def __getitem__(self, client: str) -> int:
        """Returns the demerit of a client.

        Raises:
            KeyError: If it has none.
        """
        if demerit := self._known[client].demerit(self._number):
            return demerit
        raise KeyError(client)

    def __iter__(self) -> Iterator[str]:
        """Yields the clients that have a demerit."""
        return (client for client, conduct in self._known.items() if conduct.demerit(self._number))

    def __len__(self) -> int:
        """Returns how many clients have a demerit."""
        return sum(1 for _ in self)


def _after(before: Conduct, ticket: Ticket, number: int, *, met: bool) -> Conduct:
    match ticket.state:
        case TicketState.RECEIVED:
            return GOOD
        case TicketState.REFUSED:
            return Conduct(before.missed + 1, number, before.refused + 1)
        case TicketState.LATE if met:
            return before
        case TicketState.ISSUED:  # it stays good in the round after
            return before
        case _:
            return Conduct(before.missed + 1, number, before.refused)


def _arrived(ticket: Ticket) -> bool:
    excluded = ticket.state is TicketState.REFUSED and ticket.reason.startswith(UpdateExcluded.reason)
    return ticket.state is TicketState.RECEIVED or excluded
