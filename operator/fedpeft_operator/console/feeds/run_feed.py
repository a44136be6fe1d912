"""One watch of a run, however many browsers look at it.

Notable: it goes on through restarts of the server (`fedpeft.api.following`), and what pages make of a run is made once
between two changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar, cast

from fedpeft.api import views
from fedpeft.api.following import RunSnapshot, follow
from fedpeft.api.operator_client import Connect
from fedpeft.errors import FedpeftError, Internal, Unavailable
from fedpeft_operator.console.feeds.change_signal import ChangeSignal
from fedpeft_operator.console.feeds.facts import Reader, RoundFacts

T = TypeVar("T")

RETRY_S = 2.0
SHARE = 5.0
"""Pages of a run stay for so many times what making them took: a round of thousands of clients changes all the time."""
FIRST_LOOK_S = 3.0
"""Time that a page waits for a run's first snapshot before it is shown without, seconds."""


class RunFeed:
    """Known state of one run.

    Attributes:
        run: Its id.
        snapshot: The run as it is known; None before the first answer.
        rounds: Its rounds, by number.
        lost: Cause of a lost connection, in a sentence; empty while there is one.
        error: Error that ended the following; None while it goes on, and after the run's end.
    """

    def __init__(self, run: str, connect: Connect, signal: ChangeSignal) -> None:
        self.run = run
        self.snapshot: RunSnapshot | None = None
        self.rounds: Sequence[RoundFacts] = ()
        self.lost = ""
        self.error: FedpeftError | None = None
        self._cache: dict[Hashable, object] = {}
        self._reader = Reader()
        self._connect, self._signal = connect, signal
        self._ready = asyncio.Event()
        self._fresh_until = 0.0
        self._telling: asyncio.TimerHandle | None = None
        self._following = asyncio.create_task(self._follow())

    async def ready(self) -> None:
        """Waits for the first answer, for at most `FIRST_LOOK_S`.

        A run that is over, but not scored to its end, is asked for again.
        """
        if self._following.done() and self.error is None and not self._is_scored:
            self._following = asyncio.create_task(self._follow())
        try:
            async with asyncio.timeout(FIRST_LOOK_S):
                await self._ready.wait()
        except TimeoutError:
            return

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """Returns the value of `make`, computed once between two changes of the run."""
        if key not in self._cache:
            began = time.monotonic()
            self._cache[key] = make()
            now = time.monotonic()
            self._fresh_until = max(now, self._fresh_until) + SHARE * (now - began)
        return cast(T, self._cache[key])

    def reconnect(self) -> None:
        """Reconnects at once if the server was unreachable: the pauses of a watch grow with the outage."""
        if self.lost:
            self._following.cancel()
            self._following = asyncio.create_task(self._follow())

    def close(self) -> None:
        """Ends the watch."""
        self._following.cancel()
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    @property
    def _is_scored(self) -> bool:
        """True if every version has its figures; where none has, nobody scores."""
        scored = [views.is_scored(facts.metrics) for facts in self.rounds if facts.is_committed]
        return all(scored) or not any(scored)

    async def _follow(self) -> None:
        while True:
            try:
                async for snapshot in follow(self._connect, self.run):
                    self.snapshot, self.lost = snapshot, snapshot.lost
                    self.rounds = self._reader.rounds(snapshot)
                    self._changed()
                return
            except Unavailable as error:
                self.lost = error.in_short
            except FedpeftError as error:
                self.error = error
            except Exception as error:  # a fault of ours: said on the page like any other, and not lost with the task
                self.error = Internal(f"the console cannot follow {self.run}: {type(error).__name__}: {error}")
            self._changed()
            if self.error is not None:
                return
            await asyncio.sleep(RETRY_S)

    def _changed(self) -> None:
        """Lets pages be made again: at once, or later where making them takes long."""
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(max(0.0, self._fresh_until - time.monotonic()), self._tell)

    def _tell(self) -> None:
        self._telling = None
        self._cache.clear()
        self._ready.set()
        self._signal.notify()
