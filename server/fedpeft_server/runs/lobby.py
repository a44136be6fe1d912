"""The lobby: the clients that wait to be sampled. It is state of the moment, so it is kept in memory only.

Those that wait with other daemons on the same database count as well: daemons tell each other who comes and goes.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from fedpeft.errors import Draining
from fedpeft.rpc.timing import HOLD_S, LONGEST_HOLD_S
from fedpeft_server.sharing.seats import Seat, SeatsElsewhere
from fedpeft_server.timing import Timing

POLLS_PER_S = 10.0
"""Polls a second of all waiting clients together, by which the time grows that each of them is asked to be held."""


@dataclass(slots=True, eq=False)
class Waiter:
    """One waiting client; `run` is empty when any run will do but those left out. Only trainers are sampled.

    `called` is its poll in progress: True once there is something for it, False once the poll is over without that.
    """

    client: str
    run: str
    trainer: bool
    left_out: frozenset[str]
    called: asyncio.Future[bool]
    until: float = float("inf")


def _everybody(_run: str, _client: str) -> bool:
    return True


class Lobby:
    """The waiting clients, and which of them each run may sample: kept as they come and go, never gathered anew.

    Args:
        changed: Called with a run whenever somebody comes or goes that it may sample.
        takes_part: Says of a run and a client whether it takes part; `sort` must be called when that changes.
        timing: Time for which a client lingers after its poll was answered.

    Attributes:
        moved: Set once somebody came or went.
    """

    def __init__(
        self,
        changed: Callable[[str], None],
        timing: Timing,
        takes_part: Callable[[str, str], bool] = _everybody,
    ) -> None:
        self.moved = asyncio.Event()
        self._changed = changed
        self._timing = timing
        self._takes_part = takes_part
        self._waiters: dict[str, Waiter] = {}
        self._evaluators: dict[str, Waiter] = {}  # those that are not trainers
        self._lingering: dict[str, Waiter] = {}  # those with an end, the next one to end first
        self._waiting: dict[str, set[str]] = {}  # by run that was asked about: the clients that it may sample
        self._elsewhere = SeatsElsewhere()
        self._moved: set[str] | None = None  # clients that came or went since `take_moved`; None where nobody asks
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """True once the server is shutting down."""
        return self._closed

    def longer_hold_s(self) -> int:
        """Returns for how many seconds a poll should be held, so that those of all who wait are POLLS_PER_S; 0: HOLD_S.

        The upper part of it is drawn, so that those who came at once do not come again at once.
        """
        hold_s = min(len(self._waiters) / POLLS_PER_S, LONGEST_HOLD_S) * random.uniform(0.8, 1.0)
        return round(hold_s) if hold_s > HOLD_S else 0

    async def wait(
        self, client: str, run: str, *, trainer: bool, hold_s: float, left_out: frozenset[str] = frozenset()
    ) -> bool:
        """Waits until the client is called, for at most `hold_s` seconds. A second wait of a client ends its first.

        Returns:
            True if it was called; False as well if another wait of the client took its waiter: were that a call, both
            would look, find nothing, and take the waiter from each other without end.

        Raises:
            Draining: If the server is shutting down.
        """
        loop = asyncio.get_running_loop()
        waiter = self._sit(Waiter(client, run, trainer, left_out, loop.create_future()))
        called = waiter.called
        timer = loop.call_later(hold_s, self._end_poll, waiter, called)
        try:
            found = await called
        except asyncio.CancelledError:
            if waiter.called is called:
                self._leave(waiter)
            raise
        finally:
            timer.cancel()
        self._refuse_if_closed()
        return found

    def waiting(self, run: str) -> AbstractSet[str]:
        """Returns the clients that a run may sample: not a copy, so they are those of the moment at any time.

        Waiters are looked through the first time that a run is asked about, and then no more until `forget`.
        """
        self.expire()
        if run not in self._waiting:
            everybody = {*self._waiters, *self._elsewhere.clients()}
            self._waiting[run] = {client for client in everybody if self._may_sample(run, client)}
        return self._waiting[run]

    def seats(self) -> dict[str, Seat]:
        """Returns the trainers that wait here, and begins to note who comes and goes."""
        self._moved = set()
        return {client: Seat(w.run, w.left_out) for client, w in self._waiters.items() if w.trainer}

    def take_moved(self) -> dict[str, Seat | None]:
        """Returns those that came since this was asked last, and those that went; there is none for them."""
        self.expire()
        moved, self._moved = self._moved or set(), set()
        waiters = {client: self._waiters.get(client) for client in moved}
        return {client: Seat(w.run, w.left_out) if w and w.trainer else None for client, w in waiters.items()}

    def seat_elsewhere(self, daemon: str, seats: Iterable[tuple[str, Seat | None]]) -> None:
        """Notes who waits with another daemon, and who does no more."""
        for client, seat in seats:
            self._elsewhere.put(daemon, client, seat)
            self.sort(client)

    def vacate(self, daemon: str) -> None:
        """Notes that nobody waits with another daemon any more."""
        self.seat_elsewhere(daemon, [(client, None) for client in self._elsewhere.of_daemon(daemon)])

    def waits_elsewhere(self, client: str) -> bool:
        """Returns True if a client waits with another daemon."""
        return bool(self._elsewhere.of(client))

    def expire(self) -> None:
        """Takes out those whose poll ended and who did not ask again."""
        now = time.monotonic()
        while self._lingering and (waiter := next(iter(self._lingering.values()))).until < now:
            self._remove(waiter)

    def sort(self, client: str) -> None:
        """Puts a waiting client where it may be sampled: it has just come, or takes part in other runs than before."""
        for run, waiting in self._waiting.items():
            if self._may_sample(run, client) is not (client in waiting):
                waiting.symmetric_difference_update((client,))
                self._changed(run)

    def forget(self, run: str) -> None:
        """Drops what is kept of a run that samples nobody any more."""
        self._waiting.pop(run, None)

    def is_waiting(self, client: str) -> bool:
        """Returns True if a client waits now."""
        waiter = self._waiters.get(client)
        return (waiter is not None and waiter.until >= time.monotonic()) or self.waits_elsewhere(client)

    def wake(self, client: str) -> None:
        """Tells a waiting client that there is something for it; one that lingers finds out when it asks again."""
        waiter = self._waiters.get(client)
        if waiter:
            self._remove(waiter)
            _answer(waiter.called, found=True)

    def wake_sampled(self, client: str) -> None:
        """Tells a client that it was sampled here; one that waits elsewhere counts no more until that is told again.

        The daemon there tells it, and others need not wait for its word.
        """
        if self.waits_elsewhere(client):
            self._elsewhere.vacate(client)
            self.sort(client)
        self.wake(client)

    def wake_evaluators(self) -> None:
        """Tells evaluators that there is a new version."""
        for client in list(self._evaluators):
            self.wake(client)

    def wake_all(self) -> None:
        """Wakes everybody to look again, because runs have begun or ended."""
        for client in list(self._waiters):
            self.wake(client)

    def close(self) -> None:
        """Sends everybody away."""
        self._closed = True
        self.wake_all()

    def _sit(self, new: Waiter) -> Waiter:
        """Returns the waiter of a poll: the one before, still in its place, if the client asks for the same again."""
        self._refuse_if_closed()
        before = self._waiters.get(new.client)
        if before is not None:
            _answer(before.called, found=False)
            if (before.run, before.trainer, before.left_out) == (new.run, new.trainer, new.left_out):
                before.called, before.until = new.called, new.until
                self._lingering.pop(new.client, None)
                return before
            self._remove(before)
        self._waiters[new.client] = new
        if not new.trainer:
            self._evaluators[new.client] = new
        self._note_move(new.client)
        self.sort(new.client)
        return new

    def _end_poll(self, waiter: Waiter, called: asyncio.Future[bool]) -> None:
        """Ends a poll whose time is over; its client lingers."""
        if not called.done():
            called.set_result(False)
            waiter.until = time.monotonic() + self._timing.lobby_linger_s
            self._lingering[waiter.client] = waiter

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")

    def _may_sample(self, run: str, client: str) -> bool:
        waiter = self._waiters.get(client)
        here = waiter is not None and waiter.trainer and waiter.run in ("", run) and run not in waiter.left_out
        waits = here or any(seat.is_for(run) for seat in self._elsewhere.of(client))
        return waits and self._takes_part(run, client)

    def _note_move(self, client: str) -> None:
        if self._moved is not None:
            self._moved.add(client)
            self.moved.set()

    def _leave(self, waiter: Waiter) -> None:
        if self._waiters.get(waiter.client) is waiter:
            self._remove(waiter)

    def _remove(self, waiter: Waiter) -> None:
        del self._waiters[waiter.client]
        self._lingering.pop(waiter.client, None)
        self._evaluators.pop(waiter.client, None)
        self._note_move(waiter.client)
        self.sort(waiter.client)


def _answer(called: asyncio.Future[bool], *, found: bool) -> None:
    if not called.done():
        called.set_result(found)
