"""The rounds of a run as messages, a part at a time, each small enough to be sent."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from functools import partial

from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.v1 import run_pb2
from fedpeft_server.rpc.messages import round_message, ticket_message
from fedpeft_server.rpc.pages import MOST, PAGE_BYTES
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.store.queries.figures import RECORDS
from fedpeft_server.store.rows import Place, RoundFigures
from fedpeft_server.store.store import Store
from fedpeft_server.traffic import ByteCounter

TICKETS = 2000
"""Most tickets read for one part."""
FEW = 100
"""So many changed tickets are told by themselves; more are told with their whole round."""

Part = list[run_pb2.Round]


class History:
    """Rounds as they are in the database, with the bytes that are not written there yet."""

    def __init__(self, store: Store, byte_counter: ByteCounter) -> None:
        self._store = store
        self._byte_counter = byte_counter

    async def part(
        self, engine: RunEngine, place: Place, most: int = MOST, *, records: bool = True
    ) -> tuple[Part, Place | None]:
        """Returns rounds from a place on, the one in progress included, and where to go on; None at the end.

        Args:
            engine: The run.
            place: Place to begin at.
            most: Most rounds.
            records: True if the rounds have their records; they are not read otherwise.
        """
        run, current = engine.run.id, engine.round
        characters = RECORDS if records else 0
        rows, then = await self._store.read_prepared(
            lambda: partial(
                self._store.db.rounds_from, run, place, most, TICKETS, self._byte_counter.pending(run), characters
            )
        )
        rounds, cut = _fitting(rows)
        then = cut or then
        last = rows[-1].round.number if rows else place.after
        if then is None and engine.active and last < current.number:  # not written yet: nobody was sampled for it
            if len(rounds) == most:
                return rounds, Place(last)
            rounds.append(round_message(RoundFigures(current)))
        return rounds, then

    async def one(self, engine: RunEngine, current: Round, tickets: Sequence[str] = ()) -> run_pb2.Round:
        """Returns a round without its record, with those of its tickets that are named."""
        run = engine.run.id
        row = await self._store.read_prepared(
            lambda: partial(self._store.db.round_with, run, current.number, tickets, self._byte_counter.pending(run))
        )
        message = round_message(row or RoundFigures(current))
        message.tickets.extend(ticket_message(figures) for figures in (row.tickets if row else ()))
        return message

    async def changes(
        self, engine: RunEngine, before: Round | None, after: int, scored: Iterable[int]
    ) -> AsyncGenerator[Part, None]:
        """Yields what a watcher does not know yet; what it costs does not depend on how many rounds were held.

        Args:
            engine: The run.
            before: The round in progress when the watcher was told last; None the first time.
            after: Number of the round after which the watcher wants to begin.
            scored: Versions that have new figures.
        """
        now = engine.round
        fresh = _changed(before, now)
        if before is None or fresh is None:
            known = min(after, now.number) if before is None else before.number - 1
            whole: Place | None = Place(known)
            while whole is not None:
                rounds, whole = await self.part(engine, whole, records=False)
                yield rounds
        else:
            known = now.number - 1
            yield [await self.one(engine, now, fresh)]
        for number in sorted(n for n in scored if 0 < n <= known):
            yield [await self.one(engine, Round(now.run, number))]


def _changed(before: Round | None, now: Round) -> list[str] | None:
    """Returns the tickets that differ between two states of a round; None if it is better told as a whole."""
    committed = now.phase is Phase.COMMITTED
    if before is None or before.number != now.number or committed is not (before.phase is Phase.COMMITTED):
        return None  # a commit gives every ticket its weight
    known = {id(ticket) for ticket in before.tickets}  # the very same objects: comparing identities is cheap
    fresh = [ticket.id for ticket in now.tickets if id(ticket) not in known]
    return fresh if len(fresh) <= FEW else None


def _fitting(rows: Sequence[RoundFigures]) -> tuple[Part, Place | None]:
    """Returns as much of some rounds, from the first on, as fits into a message, and the place where it was cut."""
    rounds: Part = []
    room = PAGE_BYTES
    for row in rows:
        number = row.round.number
        message = round_message(row)
        room -= message.ByteSize()
        if rounds and room < 0:
            return rounds, Place(number - 1)
        rounds.append(message)
        for figures in row.tickets:
            ticket = ticket_message(figures)
            room -= ticket.ByteSize()
            if message.tickets and room < 0:
                return rounds, Place(number - 1, message.tickets[-1].client)
            message.tickets.append(ticket)
    return rounds, None
