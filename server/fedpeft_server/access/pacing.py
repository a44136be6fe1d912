"""Pacing: how many calls one caller makes, at once and in time; asked before a message of the call is read."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fedpeft.errors import TooManyCalls
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import Rate
from fedpeft_server.access.call import Party
from fedpeft_server.timing import Timing


class TokenBucket:
    """A bucket that lends: what is taken beyond its content is a debt, and the debt a waiting time."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._left = float(rate.burst)
        self._at = now

    def wait_s(self, now: float) -> float:
        """Returns how long the next event has to wait, seconds."""
        self._left = min(self._rate.burst, self._left + (now - self._at) * self._rate.per_s)
        self._at = now
        return max(0.0, (1 - self._left) / self._rate.per_s)

    def take(self) -> None:
        """Takes one event, which waits as long as `wait_s` said before."""
        self._left -= 1


class Pacing:
    """Counts the calls of each caller, and makes those wait that come too fast.

    Args:
        clock: Monotonic seconds.
        timing: Longest wait of a call, and delay of a refusal.
    """

    def __init__(self, timing: Timing, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._timing = timing
        self._under_way: Counter[Party] = Counter()
        self._buckets: OrderedDict[tuple[Party, str], TokenBucket] = OrderedDict()
        self._held = 0

    @asynccontextmanager
    async def paced(self, party: Party, method: str) -> AsyncIterator[None]:
        """Counts a call for as long as the block lasts; waits first where its caller is too fast.

        Raises:
            TooManyCalls: If its caller has too many calls under way, or would have to wait too long.
        """
        most = bounds.CALLERS[party.role].under_way
        if self._under_way[party] >= most:
            await self.delay_refusal()
            raise TooManyCalls(f"{party} has {most} calls under way, the most one may have; end some")
        self._under_way[party] += 1
        try:
            await self._wait(party, method)
            yield
        finally:
            self._under_way[party] -= 1
            if not self._under_way[party]:
                del self._under_way[party]

    async def _wait(self, party: Party, method: str) -> None:
        now = self._clock()
        own = bounds.CALLS[method].rate if method in bounds.CALLS else None
        rates = [("", bounds.CALLERS[party.role].rate), *([(method, own)] if own else [])]
        buckets = [(rate, self._bucket(party, name, rate, now)) for name, rate in rates]
        wait_s, slowest = max(((bucket.wait_s(now), rate) for rate, bucket in buckets), key=lambda found: found[0])
        if wait_s > self._timing.call_wait_s:
            await self.delay_refusal()
            what = f"{method.rpartition('/')[2]} calls" if slowest is own else "calls"
            raise TooManyCalls(f"{party} makes more than {slowest.per_s:g} {what} a second; call less often")
        for _, bucket in buckets:
            bucket.take()
        if wait_s:
            await asyncio.sleep(wait_s)

    def _bucket(self, party: Party, name: str, rate: Rate, now: float) -> TokenBucket:
        bucket = self._buckets.pop((party, name), None) or TokenBucket(rate, now)
        self._buckets[party, name] = bucket
        if len(self._buckets) > bounds.MOST_CALLERS:
            self._buckets.popitem(last=False)
        return bucket

    async def delay_refusal(self) -> None:
        """Delays a refusal, so that a caller that repeats the call at once does so at a low rate."""
        if self._held >= bounds.MOST_REFUSALS_HELD:
            return
        self._held += 1
        try:
            await asyncio.sleep(self._timing.refusal_delay_s)
        finally:
            self._held -= 1
