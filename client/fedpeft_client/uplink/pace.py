"""The pace of asking for work: a server that answers at once and gives no work is not asked again at once.

A server holds the answer back while there is nothing to do, so an honest one is asked three times a minute. One that
does not, or that offers runs without end, or does not know a client that has just registered, would otherwise be asked
as fast as the network allows, and each question is a line of the ledger sooner or later.
"""

from __future__ import annotations

import time

from fedpeft_client.timing import TIMING, Timing
from fedpeft_client.uplink.retry import Backoff

FREE_OFFERS = 64
"""Offers in a row that are judged without a pause: a server has so many runs after a start of the client."""


class Pace:
    """Pauses between steps that brought nothing; each pause in a row is twice as long as the one before, up to 10 s."""

    def __init__(self, timing: Timing = TIMING) -> None:
        self._quick_s = timing.quick_s
        self._backoff = Backoff(timing.first_pause_s, timing.longest_pause_s)
        self._offers = 0
        self._began = 0.0

    def begin(self) -> None:
        """Notes that a step begins."""
        self._began = time.monotonic()

    def worked(self) -> None:
        """Notes that a step brought work."""
        self._backoff.reset()
        self._offers = 0

    async def offered(self, *, new: bool) -> None:
        """Ends a step that brought an offer; `new` says whether it was one that was not judged before."""
        self._offers += 1
        if not new or self._offers > FREE_OFFERS:
            await self._backoff.pause()

    async def nothing(self) -> None:
        """Ends a step that brought nothing: pauses if it did so at once."""
        self._offers = 0
        if time.monotonic() - self._began < self._quick_s:
            await self._backoff.pause()
        else:
            self._backoff.reset()
