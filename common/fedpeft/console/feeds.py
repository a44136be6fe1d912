"""One watch per run, however many browsers look at it.

Notable: a feed follows its run through restarts of the server (`fedpeft.following`) and rings the bell at each change;
feeds that nobody looks at stay, up to a number, because pages are left and come back to.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

from fedpeft.console.bell import Bell
from fedpeft.console.facts import Reader, RoundFacts
from fedpeft.console.line import Connect
from fedpeft.errors import FedpeftError, Internal, Unavailable
from fedpeft.following import Picture, follow

T = TypeVar("T")

MOST_FEEDS = 64
"""Runs that are followed though nobody looks at them."""
RETRY_S = 2.0
FIRST_LOOK_S = 3.0
"""How long a page waits for a run's first picture before it is shown without."""


class RunFeed:
    """What is known of one run.

    Attributes:
        run: Its id.
        picture: The run as it is known; None before the first answer.
        rounds: Its rounds, by number.
        lost: Why there is no connection, in a sentence; empty while there is one.
        error: Why it is not followed any more; None while it is, and after its end.
    """

    def __init__(self, run: str, connect: Connect, bell: Bell) -> None:
        self.run = run
        self.picture: Picture | None = None
        self.rounds: Sequence[RoundFacts] = ()
        self.lost = ""
        self.error: FedpeftError | None = None
        self._made: dict[Hashable, object] = {}
        self._reader = Reader()
        self._connect, self._bell = connect, bell
        self._looked = asyncio.Event()
        self._following = asyncio.create_task(self._follow())

    async def looked(self) -> None:
        """Waits for the first answer, and not for long.

        A run that is over, but not scored to its end, is asked for again.
        """
        if self._following.done() and self.error is None and not self._is_scored:
            self._following = asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._looked.wait()
        except TimeoutError:
            return

    def made(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns what a page makes of the run, made once between two changes."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def hurry(self) -> None:
        """Asks again at once if the server was away: the pauses of a watch grow with its absence."""
        if self.lost:
            self.close()
            self._following = asyncio.create_task(self._follow())

    def close(self) -> None:
        """Ends the watch."""
        self._following.cancel()

    @property
    def _is_scored(self) -> bool:
        """Whether every version has its figures; where none has, nobody scores."""
        scored = ["accuracy" in facts.metrics for facts in self.rounds if facts.is_committed]
        return all(scored) or not any(scored)

    async def _follow(self) -> None:
        while True:
            try:
                async for picture in follow(self._connect, self.run):
                    self.picture, self.lost = picture, picture.lost
                    self.rounds = self._reader.rounds(picture)
                    self._changed()
                return
            except Unavailable as error:
                self.lost = error.message.partition(";")[0]
            except FedpeftError as error:
                self.error = error
            except Exception as error:  # a fault of ours: said on the page like any other, and not lost with the task
                self.error = Internal(f"the console cannot follow {self.run}: {type(error).__name__}: {error}")
            self._changed()
            if self.error is not None:
                return
            await asyncio.sleep(RETRY_S)

    def _changed(self) -> None:
        self._made.clear()
        self._looked.set()
        self._bell.ring()


class Feeds:
    """All feeds, the one asked for last at the end.

    Args:
        connect: Makes a client of the server.
        bell: Rung at each change of any run.
    """

    def __init__(self, connect: Connect, bell: Bell) -> None:
        self._connect, self._bell = connect, bell
        self._feeds: OrderedDict[str, RunFeed] = OrderedDict()
        self._held: Counter[str] = Counter()

    def of(self, run: str, *, again: bool = False) -> RunFeed:
        """Returns the feed of a run, begun if it is not there, and if it has failed and is to be tried `again`."""
        feed = self._feeds.get(run)
        if feed is None or (again and feed.error is not None):
            feed = self._feeds[run] = RunFeed(run, self._connect, self._bell)
        self._feeds.move_to_end(run)
        self._shed()
        return feed

    @contextmanager
    def holding(self, runs: Sequence[str]) -> Iterator[None]:
        """Keeps the feeds of some runs while they are looked at."""
        self._held.update(runs)
        try:
            yield
        finally:
            self._held.subtract(runs)
            self._shed()

    def hurry(self) -> None:
        """Tells every feed that the server is back."""
        for feed in self._feeds.values():
            feed.hurry()

    def close(self) -> None:
        """Ends every watch."""
        for feed in self._feeds.values():
            feed.close()

    def _shed(self) -> None:
        idle = [run for run in self._feeds if self._held[run] <= 0]
        for run in idle[: max(0, len(idle) - MOST_FEEDS)]:
            self._feeds.pop(run).close()
            del self._held[run]
