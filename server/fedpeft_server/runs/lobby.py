"""The lobby: who waits to be sampled. Presence is a fact of the moment, so it lives in memory and nowhere else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
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


def _everybody(_run: str, _client: str) -> bool:
    return True


class Lobby:
    """The waiting clients, and which of them each run may sample: kept as they come and go, never gathered anew.

    Args:
        changed: Called whenever somebody comes or goes.
        takes_part: Says of a run and a client whether it takes part; `sort` must be called when that changes.
    """

    def __init__(self, changed: Callable[[], None], takes_part: Callable[[str, str], bool] = _everybody) -> None:
        self._changed = changed
        self._takes_part = takes_part
        self._seats: dict[str, Seat] = {}
        self._lingering: dict[str, Seat] = {}  # of the seats: those with an end, the next one to end first
        self._waiting: dict[str, set[str]] = {}  # by run that was asked about: the clients that it may sample
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
        self.sort(client)
        self._changed()
        try:
            async with asyncio.timeout(hold_s):
                await seat.called.wait()
        except TimeoutError:
            self._linger(seat)
            return False
        except asyncio.CancelledError:
            self._leave(seat)
            raise
        self._leave(seat)
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")
        return not seat.replaced

    def waiting(self, run: str) -> AbstractSet[str]:
        """Returns the clients that a run may sample: not a copy, so they are those of the moment at any time.

        Seats are looked through the first time that a run is asked about, and then no more until `forget`.
        """
        now = time.monotonic()
        while self._lingering and (seat := next(iter(self._lingering.values()))).until < now:
            self._remove(seat)
        if run not in self._waiting:
            self._waiting[run] = {seat.client for seat in self._seats.values() if self._may_sample(run, seat)}
        return self._waiting[run]

    def sort(self, client: str) -> None:
        """Puts a waiting client where it may be sampled: it has just come, or takes part in other runs than before."""
        seat = self._seats.get(client)
        for run, waiting in self._waiting.items():
            if seat is not None and self._may_sample(run, seat):
                waiting.add(client)
            else:
                waiting.discard(client)

    def forget(self, run: str) -> None:
        """Drops what is kept of a run that samples nobody any more."""
        self._waiting.pop(run, None)

    def is_waiting(self, client: str) -> bool:
        """Says whether a client waits now."""
        seat = self._seats.get(client)
        return seat is not None and seat.until >= time.monotonic()

    def call(self, client: str) -> None:
        """Tells a waiting client that there is something for it; one that lingers finds out when it asks again."""
        seat = self._seats.get(client)
        if seat:
            self._remove(seat)
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

    def _may_sample(self, run: str, seat: Seat) -> bool:
        here = seat.trainer and seat.run in ("", run) and run not in seat.left_out
        return here and self._takes_part(run, seat.client)

    def _linger(self, seat: Seat) -> None:
        seat.until = time.monotonic() + LINGER_S
        if self._seats.get(seat.client) is seat:
            self._lingering[seat.client] = seat

    def _leave(self, seat: Seat) -> None:
        if self._seats.get(seat.client) is seat:
            self._remove(seat)
            self._changed()

    def _remove(self, seat: Seat) -> None:
        del self._seats[seat.client]
        self._lingering.pop(seat.client, None)
        for waiting in self._waiting.values():
            waiting.discard(seat.client)
