"""The runs that are followed, one feed each.

Notable: feeds that nobody looks at stay, up to a number, because pages are left and come back to.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedpeft.api.operator_client import Connect
from fedpeft_operator.console.feeds.change_signal import ChangeSignal
from fedpeft_operator.console.feeds.run_feed import RunFeed

MOST_FEEDS = 64
"""Runs that are followed though nobody looks at them."""


class Feeds:
    """All feeds, the one asked for last at the end.

    Args:
        connect: Makes a client of the server.
        signal: Notified of each change of any run.
    """

    def __init__(self, connect: Connect, signal: ChangeSignal) -> None:
        self._connect, self._signal = connect, signal
        self._feeds: OrderedDict[str, RunFeed] = OrderedDict()
        self._held: Counter[str] = Counter()

    def of(self, run: str, *, force: bool = False) -> RunFeed:
        """Returns the feed of a run, started if there is none; `force` restarts one that has failed."""
        feed = self._feeds.get(run)
        if feed is None or (force and feed.error is not None):
            feed = self._feeds[run] = RunFeed(run, self._connect, self._signal)
        self._feeds.move_to_end(run)
        self._shed()
        return feed

    @contextmanager
    def in_use(self, runs: Sequence[str]) -> Iterator[None]:
        """Keeps the feeds of some runs while the block lasts."""
        self._held.update(runs)
        try:
            yield
        finally:
            self._held.subtract(runs)
            self._shed()

    def reconnect(self) -> None:
        """Reconnects every feed: the server is back."""
        for feed in self._feeds.values():
            feed.reconnect()

    def close(self) -> None:
        """Ends every watch."""
        for feed in self._feeds.values():
            feed.close()

    def _shed(self) -> None:
        idle = [run for run in self._feeds if self._held[run] <= 0]
        for run in idle[: max(0, len(idle) - MOST_FEEDS)]:
            self._feeds.pop(run).close()
            del self._held[run]
