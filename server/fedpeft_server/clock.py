"""The time on the database's clock: daemons that share one agree on deadlines though their machines' clocks do not."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger()

MOST_APART_S = 60.0
"""Seconds by which a machine's clock may be another than the database's before that is warned of."""


class DatabaseClock:
    """A clock that is set by the database's; this machine's own until then, and where no other daemon shares it."""

    def __init__(self) -> None:
        self._ahead_s = 0.0
        self._is_apart = False

    def time(self) -> float:
        """Returns the time in seconds since the epoch."""
        return time.time() + self._ahead_s

    async def set(self, now: Callable[[], Awaitable[float]]) -> None:
        """Sets the clock by what `now` says; it was read in the middle of that call, as nothing better is known."""
        began = time.time()
        there = await now()
        self._ahead_s = there - (began + time.time()) / 2
        is_apart = abs(self._ahead_s) > MOST_APART_S
        if is_apart and not self._is_apart:
            log.warning(
                "this machine's clock is not the database's; set it: certificates begin and end by it",
                seconds_behind=round(self._ahead_s),
            )
        self._is_apart = is_apart
