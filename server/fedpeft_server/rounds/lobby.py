"""The lobby: who waits to be sampled. Presence is a fact of the moment, so it lives in memory and nowhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedpeft.errors import Draining

LINGER_S = 2.0
"""A client whose poll was just answered with `idle` still counts as waiting for so long: it is about to ask again."""


@dataclass
class Seat:
    """One waiting client; `run` is empty when any run will do but those left out. Only trainers are sampled."""

    client: str
    run: str
    trainer: bool
    called: asyncio.Event
    left_out: frozenset[str] = frozenset()
    until: float = float("inf")
    replaced: bool = False


class Lobby:
    """The waiting clients.

    Args:
        changed: Called whenever somebody comes or goes.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._seats: dict[str, Seat] = {}
        self._closed = False

    async def wait(
        self, client: str, run: str, *, trainer: bool, hold_s: float, left_out: frozenset[str] = frozenset()
    ) -> bool:
        """Waits until the client is called, for at most `hold_s` seconds. A second wait of a client ends its first.

        Returns:
            Whether it was called; False as well if another wait of the client took its seat: were that a call, both
            would look, find nothing, and take the seat from each other without end.

        Raises:
            Draining: If the server is shutting down.
        """
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")
        if client in self._seats:
            self._seats[client].replaced = True
            self.call(client)
        seat = Seat(client, run, trainer, asyncio.Event(), left_out)
        self._seats[client] = seat
        self._changed()
        try:
            async with asyncio.timeout(hold_s):
                await seat.called.wait()
        except TimeoutError:
            seat.until = time.monotonic() + LINGER_S
            return False
        except asyncio.CancelledError:
            self._leave(seat)
            raise
        self._leave(seat)
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")
        return not seat.replaced

    def waiting(self, run: str) -> frozenset[str]:
        """Returns the clients that a run may sample now."""
        now = time.monotonic()
        for seat in [s for s in self._seats.values() if s.until < now]:
            del self._seats[seat.client]
        seats = (seat for seat in self._seats.values() if seat.trainer and seat.run in ("", run))
        return frozenset(seat.client for seat in seats if run not in seat.left_out)

    def is_waiting(self, client: str) -> bool:
        """Says whether a client waits now."""
        seat = self._seats.get(client)
        return seat is not None and seat.until >= time.monotonic()

    def call(self, client: str) -> None:
        """Tells a waiting client that there is something for it; one that lingers finds out when it asks again."""
        seat = self._seats.pop(client, None)
        if seat:
            seat.called.set()

    def call_evaluators(self) -> None:
        """Tells evaluators that there is a new version."""
        for seat in [s for s in self._seats.values() if not s.trainer]:
            self.call(seat.client)

    def call_all(self) -> None:
        """Wakes everybody to look again, because runs have begun or ended."""
        for client in list(self._seats):
            self.call(client)

    def close(self) -> None:
        """Sends everybody away."""
        self._closed = True
        self.call_all()

    def _leave(self, seat: Seat) -> None:
        if self._seats.get(seat.client) is seat:
            del self._seats[seat.client]
            self._changed()
