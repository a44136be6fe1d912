"""Transfer slots: a limited number of transfers at once, so that the server's memory does not grow with its clients.

First come, first served. A transfer may take as long as it likes while nobody waits; once somebody does, it has a turn
of stated length, then gives way after the chunk under way, or at once if nothing comes or is read, lines up again and
goes on at the byte where it stands. So neither a few slow clients nor silent ones keep the others waiting.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedpeft.errors import Draining, TransfersBusy, TurnOver
from fedpeft.rpc.timing import HOLD_S
from fedpeft_server.timing import Timing


class TransferSlot:
    """A client's place in the queue, and then its right to be served."""

    def __init__(self, slots: TransferSlots, client: str, turn_s: float) -> None:
        self.client = client
        self.came = asyncio.Event()
        """Set when there is no more to wait for."""
        self.since = 0.0
        """Its start on the monotonic clock."""
        self.until = math.inf
        """Time at which its place is lost, once its call has ended."""
        self.replaced = False
        """True once another transfer of the client took its place or slot."""
        self._slots = slots
        self._turn_s = turn_s
        self._waiting: asyncio.Timeout | None = None
        self._ended = False

    @property
    def here(self) -> bool:
        """True while its call is still there."""
        return self.until == math.inf

    def replace(self) -> None:
        """Gives the place or slot to another transfer of the client; a wait under `bounded` ends at once."""
        self.replaced = True
        self.came.set()
        if self._waiting is not None and not self._waiting.expired():  # one that is just expiring ends by itself
            self._waiting.reschedule(0)

    @asynccontextmanager
    async def bounded(self, seconds: float) -> AsyncIterator[None]:
        """Bounds a wait for the other side.

        Raises:
            TurnOver: As soon as another transfer of the client takes the slot, or once it had its time and others wait.
            TimeoutError: After `seconds`.
        """
        self._check_place()
        try:
            async with asyncio.timeout(seconds) as self._waiting:
                if self._slots.awaited():
                    self.end_if_due()
                yield
        except TimeoutError:
            self._check_place()
            if self._ended:
                raise self._over() from None
            raise
        finally:
            self._waiting, self._ended = None, False

    def end_if_due(self) -> None:
        """Ends a wait under `bounded` when the slot has had its time: others wait for it now."""
        if self._waiting is None or self._waiting.expired() or self.since == 0:
            return
        left = self.since + self._turn_s - time.monotonic()
        ends, loop = self._waiting.when(), asyncio.get_running_loop()
        if ends is None or ends > loop.time() + left:
            self._waiting.reschedule(loop.time() + max(left, 0))
            self._ended = True

    def check(self) -> None:
        """Says after a chunk whether there may be another.

        Raises:
            TurnOver: If there may not.
        """
        self._check_place()
        if time.monotonic() - self.since >= self._turn_s and self._slots.awaited():
            raise self._over()

    def _over(self) -> TurnOver:
        return TurnOver(
            f"this transfer had its slot of {self._turn_s:g} s and others wait; continue at the first byte missing"
        )

    def _check_place(self) -> None:
        if self.replaced:
            raise TurnOver(
                f"another transfer of client {self.client} took this one's slot; continue at the first byte missing"
            )


class TransferSlots:
    """Lets `limit` transfers through at once, one a client, in the order in which they asked.

    Args:
        limit: Number of slots.
        timing: Time for which a transfer is served while others wait, and a place is kept.
    """

    def __init__(self, limit: int, timing: Timing) -> None:
        self._limit = limit
        self._timing = timing
        self._line: dict[str, TransferSlot] = {}
        self._held: dict[str, TransferSlot] = {}
        self._closed = False

    @asynccontextmanager
    async def take(self, client: str) -> AsyncIterator[TransferSlot]:
        """Waits for a slot and holds it. A client's newer call ends its older one: that one's connection may be dead.

        Raises:
            TransfersBusy: If none comes within `HOLD_S`; the place in the queue is kept for a
                while.
            TurnOver: If another call of the client took the place.
            Draining: If the server shuts down before the slot came.
        """
        self._refuse_if_closed()
        slot = TransferSlot(self, client, self._timing.transfer_turn_s)
        self._line_up(slot)
        try:
            await self._come(slot)
            yield slot
        finally:
            self._leave(slot)

    def close(self) -> None:
        """Sends those in the line away and takes no more; who has a slot keeps it."""
        self._closed = True
        line, self._line = self._line, {}
        for slot in line.values():
            slot.came.set()

    def has(self, client: str) -> bool:
        """Returns True if a client's transfer is under way."""
        return client in self._held

    def clients(self) -> list[str]:
        """Returns the clients whose transfers are under way."""
        return list(self._held)

    def awaited(self) -> bool:
        """Returns True if anybody waits for a slot."""
        now = time.monotonic()
        return any(slot.until > now for slot in self._line.values())

    def _line_up(self, slot: TransferSlot) -> None:
        held, waiting = self._held.pop(slot.client, None), self._line.get(slot.client)
        for older in (held, waiting):
            if older is not None:
                older.replace()
        if waiting is not None and waiting.until <= time.monotonic():
            del self._line[slot.client]
        self._line[slot.client] = slot  # in the older one's place, if there was one
        self._serve()
        if self._line.get(slot.client) is slot:
            for other in self._held.values():
                other.end_if_due()

    async def _come(self, slot: TransferSlot) -> None:
        try:
            async with asyncio.timeout(HOLD_S):
                await slot.came.wait()
        except TimeoutError:
            if not slot.came.is_set():  # it may have come in the same instant
                transfers = "transfers are" if self._limit > 1 else "transfer is"
                raise TransfersBusy(
                    f"{self._limit} other {transfers} under way, the most this server serves at once; "
                    "ask again at once to keep the place in the queue"
                ) from None
        if slot.replaced:
            raise TurnOver(f"another transfer of client {slot.client} has taken this one's place in the queue")
        if self._held.get(slot.client) is not slot:
            self._refuse_if_closed()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Draining("the server is shutting down; try again after a pause")

    def _leave(self, slot: TransferSlot) -> None:
        if self._held.get(slot.client) is slot:
            del self._held[slot.client]
            self._serve()
        elif self._line.get(slot.client) is slot:
            slot.until = time.monotonic() + self._timing.transfer_linger_s

    def _serve(self) -> None:
        """Gives the slots that are free to the first who are there."""
        now = time.monotonic()
        while len(self._held) < self._limit:
            slot = next((t for t in self._line.values() if t.here or t.until <= now), None)
            if slot is None:
                return
            del self._line[slot.client]
            if slot.here:
                self._held[slot.client] = slot
                slot.since = now
                slot.came.set()
