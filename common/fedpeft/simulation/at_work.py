"""The clients at work in a simulated run: the order in which their updates arrive, and the engine that computes them.

Clients with a ticket arrive in an order that the seed draws anew for each round. Rounds of a policy that has a clock
(`RoundPolicy.has_clock`) are held on it: a client is at work from the moment that it gets its ticket, for a time of the
half-normal distribution |N(0, 1)|, drawn from the seed by round and client. The order never depends on what is
computed, or on how long that really takes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain, cycle
from statistics import NormalDist

from fedpeft import seeds
from fedpeft.config import RunConfig
from fedpeft.rounds.local_job import LocalJob, LocalOutcome, Version
from fedpeft.rounds.schedule import training_of
from fedpeft.rounds.state_machine import Phase, policy_of
from fedpeft.rounds.tickets import Ticket, TicketState
from fedpeft.simulation.client_memory import ClientMemory
from fedpeft.simulation.engines import Engine
from fedpeft.simulation.report import RoundBook

_Due = tuple[float, str, str]
"""Time of an arrival, client and ticket: heaps give the earliest first."""


def duration(seed: int, number: int, client: str) -> float:
    """Returns how long a client works on the ticket that it got in a round, in units of the simulated clock."""
    uniform = seeds.derive(seed, "duration", number, client) / 2**63
    return NormalDist().inv_cdf((1 + uniform) / 2)


class ClientsAtWork:
    """Tickets that are out, the jobs that answer them, and outcomes that were computed before they arrive.

    Args:
        config: The run file.
        engine: Computes the jobs.
        memory: State that clients keep from round to round.

    Attributes:
        now: The simulated clock; it stands still in rounds that have none.
    """

    def __init__(self, config: RunConfig, engine: Engine, memory: ClientMemory) -> None:
        self._config = config
        self._engine = engine
        self._memory = memory
        inputs = engine.trainer.inputs
        self._ranks = dict(zip(sorted(inputs.clients), cycle(inputs.ranks), strict=False))
        self._not_begun: dict[str, Version] = {}
        self._to_begin: list[_Due] = []
        self._to_arrive: list[_Due] = []
        self._computed: dict[str, LocalOutcome] = {}
        self.has_clock = policy_of(config.rounds).has_clock
        self.now = 0.0

    def begin(self, ticket: Ticket, version: Version) -> None:
        """Sets a client to work on a ticket, from the version that it pulled."""
        seed, number, client = self._config.rounds.seed, ticket.issued_in, ticket.client
        due = (
            self.now + duration(seed, number, client)
            if self.has_clock
            else seeds.derive(seed, "arrival", number, client)
        )
        self._not_begun[ticket.id] = version
        heapq.heappush(self._to_begin, (due, client, ticket.id))
        heapq.heappush(self._to_arrive, (due, client, ticket.id))

    def arrivals(self, book: RoundBook) -> Iterator[tuple[Ticket, LocalOutcome]]:
        """Yields what comes for tickets of an open round, until it closes or nobody is at work; then what comes late.

        Between two of them the caller moves the round on, and may set more clients to work. Late work is done only if
        it changes what clients keep.
        """
        outcomes = self._engine.run(self._jobs(book))
        while book.round.phase is Phase.OPEN and (due := self._earliest(book)) is not None:
            while due[2] not in self._computed:
                outcome = next(outcomes, None)
                if outcome is None:  # the ticket was issued after the last job had been asked for
                    outcomes = self._engine.run(self._jobs(book))
                    continue
                self._computed[_ticket(book, outcome.client).id] = outcome
            heapq.heappop(self._to_arrive)
            self.now = due[0] if self.has_clock else self.now
            yield _ticket(book, due[1]), self._computed.pop(due[2])
        for outcome in chain(outcomes, self._engine.run(self._jobs(book))):
            ticket = _ticket(book, outcome.client)
            if ticket.state is TicketState.LATE:
                yield ticket, outcome
            else:
                self._computed[ticket.id] = outcome
        for ticket in book.round.in_state(TicketState.LATE):
            self._not_begun.pop(ticket.id, None)
            if ticket.id in self._computed:
                yield ticket, self._computed.pop(ticket.id)

    def _earliest(self, book: RoundBook) -> _Due | None:
        """Returns the next arrival; those of tickets that are out no more are forgotten."""
        while self._to_arrive:
            ticket = book.round.ticket_of(self._to_arrive[0][1])
            if ticket is not None and ticket.id == self._to_arrive[0][2] and ticket.state is TicketState.ISSUED:
                return self._to_arrive[0]
            heapq.heappop(self._to_arrive)
        return None

    def _jobs(self, book: RoundBook) -> Iterator[LocalJob]:
        """Yields the jobs of an open round's tickets in their order of arrival; of a closed one's, the late ones."""
        while book.round.phase is Phase.OPEN and self._to_begin:
            _, client, ticket_id = heapq.heappop(self._to_begin)
            ticket = book.round.ticket_of(client)
            if ticket is not None and ticket.id == ticket_id and ticket.state is TicketState.ISSUED:
                yield self._job(ticket)
        for ticket in book.round.in_state(TicketState.LATE) if self._engine.trainer.run.keeps_uncounted else ():
            if ticket.id in self._not_begun:
                yield self._job(ticket)

    def _job(self, ticket: Ticket) -> LocalJob:
        number, client = ticket.issued_in, ticket.client
        seed = seeds.training(self._config.rounds.seed, number, client)
        version, state = self._not_begun.pop(ticket.id), self._memory.state(client)
        rank = self._ranks.get(client)
        return LocalJob(client, number, seed, training_of(self._config, number), version, state, rank)


def _ticket(book: RoundBook, client: str) -> Ticket:
    """Returns the ticket of a client that is at work."""
    ticket = book.round.ticket_of(client)
    assert ticket is not None  # a client has one job at a time, and its ticket is of the round or was carried into it
    return ticket
