"""The lobby: the clients that wait to be sampled. It is state of the moment, so it is kept in memory only."""

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
class Waiter:
    """One waiting client; `run` is empty when any run will do but those left out. Only trainers are sampled."""

    client: str
    run: str
    trainer: bool
    woken: asyncio.Event
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
        self._waiters: dict[str, Waiter] = {}
        self._lingering: dict[str, Waiter] = {}  # of the seats: those with an end, the next one to end first
        self._waiting: dict[str, set[str]] = {}  # by run that was asked about: the clients that it may sample
        self._closed = False

    async def wait(
        self, client: str, run: str, *, trainer: bool, hold_s: float, left_out: frozenset[str] = frozenset()
    ) -> bool:
        """Waits until the client is called, for at most `hold_s` seconds. A second wait of a client ends its first.

        Returns:
            Whether it was called; False as well if another wait of the client took its waiter: were that a call, both
            would look, find nothing, and take the waiter from each other without end.

        Raises:
            Draining: If the server is shutting down.
        """
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")
        if client in self._waiters:
            self._waiters[client].replaced = True
            self.wake(client)
        waiter = Waiter(client, run, trainer, asyncio.Event(), left_out)
        self._waiters[client] = waiter
        self.sort(client)
        self._changed()
        try:
            async with asyncio.timeout(hold_s):
                await waiter.woken.wait()
        except TimeoutError:
            self._linger(waiter)
            return False
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        self._leave(waiter)
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")
        return not waiter.replaced

    def waiting(self, run: str) -> AbstractSet[str]:
        """Returns the clients that a run may sample: not a copy, so they are those of the moment at any time.

        Seats are looked through the first time that a run is asked about, and then no more until `forget`.
        """
        now = time.monotonic()
        while self._lingering and (waiter := next(iter(self._lingering.values()))).until < now:
            self._remove(waiter)
        if run not in self._waiting:
            self._waiting[run] = {waiter.client for waiter in self._waiters.values() if self._may_sample(run, waiter)}
        return self._waiting[run]

    def sort(self, client: str) -> None:
        """Puts a waiting client where it may be sampled: it has just come, or takes part in other runs than before."""
        waiter = self._waiters.get(client)
        for run, waiting in self._waiting.items():
            if waiter is not None and self._may_sample(run, waiter):
                waiting.add(client)
            else:
                waiting.discard(client)

    def forget(self, run: str) -> None:
        """Drops what is kept of a run that samples nobody any more."""
        self._waiting.pop(run, None)

    def is_waiting(self, client: str) -> bool:
        """Returns True if a client waits now."""
        waiter = self._waiters.get(client)
        return waiter is not None and waiter.until >= time.monotonic()

    def wake(self, client: str) -> None:
        """Tells a waiting client that there is something for it; one that lingers finds out when it asks again."""
        waiter = self._waiters.get(client)
        if waiter:
            self._remove(waiter)
            waiter.woken.set()

    def wake_evaluators(self) -> None:
        """Tells evaluators that there is a new version."""
        for waiter in [s for s in self._waiters.values() if not s.trainer]:
            self.wake(waiter.client)

    def wake_all(self) -> None:
        """Wakes everybody to look again, because runs have begun or ended."""
        for client in list(self._waiters):
            self.wake(client)

    def close(self) -> None:
        """Sends everybody away."""
        self._closed = True
        self.wake_all()

    def _may_sample(self, run: str, waiter: Waiter) -> bool:
        here = waiter.trainer and waiter.run in ("", run) and run not in waiter.left_out
        return here and self._takes_part(run, waiter.client)

    def _linger(self, waiter: Waiter) -> None:
        waiter.until = time.monotonic() + LINGER_S
        if self._waiters.get(waiter.client) is waiter:
            self._lingering[waiter.client] = waiter

    def _leave(self, waiter: Waiter) -> None:
        if self._waiters.get(waiter.client) is waiter:
            self._remove(waiter)
            self._changed()

    def _remove(self, waiter: Waiter) -> None:
        del self._waiters[waiter.client]
        self._lingering.pop(waiter.client, None)
        for waiting in self._waiting.values():
            waiting.discard(waiter.client)
