"""Retries of calls while the server is away, fails, or asks for a later one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fedpeft.errors import DiskFull, FedpeftError
from fedpeft.process.logs import Log
from fedpeft_client.error_policy import FAULT, NOT_NOW
from fedpeft_client.timing import TIMING, Timing

FAULT_ATTEMPTS = 6
"""Attempts at a call that the server fails at, before the fault is taken for one of the request."""

AWAY = "server is unavailable; retrying until it answers"
FULL = "the server's disk is full; retrying until there is room"
FAILS = "server fails at a call; retrying a few times"
PERMANENT = "server cannot be used until this is fixed; retrying"

AWAY_GROWTH = 1.25
"""Growth of the pauses while the server is away: each is about a third of the absence so far. So after a restart of a
few seconds clients are back within seconds, and a server that is away for long is asked every ten."""

T = TypeVar("T")


class Backoff:
    """Pauses that grow from `first_s` to `longest_s`, each drawn from its upper half.

    The jitter keeps a thousand clients from returning to a restarted server in the same instant.

    Args:
        first_s: The first pause.
        longest_s: The longest.
        growth: Factor between each pause and the next.
    """

    def __init__(self, first_s: float, longest_s: float, growth: float = 2.0) -> None:
        self._first_s = first_s
        self._longest_s = longest_s
        self._growth = growth
        self._next_s = first_s

    def draw(self) -> float:
        """Returns the next pause in seconds."""
        pause_s = self._next_s * random.uniform(0.5, 1.0)
        self._next_s = min(self._growth * self._next_s, self._longest_s)
        return pause_s

    async def pause(self) -> None:
        """Sleeps for the next pause."""
        await asyncio.sleep(self.draw())

    def reset(self) -> None:
        """Starts again with the shortest pause."""
        self._next_s = self._first_s


def _event(error: FedpeftError) -> str:
    """Returns what is said of an absence."""
    if isinstance(error, FAULT):
        return FAILS
    return PERMANENT if getattr(error, "permanent", False) else FULL if isinstance(error, DiskFull) else AWAY


class Retry:
    """Retries calls while the server is unreachable or asks for a later retry; logs once that it went and came back.

    Args:
        log: The log for both messages.
        give_up_s: Longest outage that is waited out, in seconds; None for no limit.
        timing: The client's.
    """

    def __init__(self, log: Log, give_up_s: float | None, timing: Timing = TIMING) -> None:
        self._log = log
        self.timing = timing
        self._progressed = 0.0
        self.give_up_s = give_up_s

    def backoff(self, growth: float = 2.0) -> Backoff:
        """Returns new pauses, of the usual lengths."""
        return Backoff(self.timing.first_pause_s, self.timing.longest_pause_s, growth)

    def note_progress(self) -> None:
        """Records that a transfer progressed: no outage is older than that, however often the connection breaks."""
        self._progressed = time.monotonic()

    async def call(self, attempt: Callable[[], Awaitable[T]], *, faults: int | None = FAULT_ATTEMPTS) -> T:
        """Returns what `attempt` returns, repeating it after a pause while the server is away, fails or has no room.

        A status with a retry hint is no failure: the server is there, and the attempt goes on as the hint says.

        Args:
            attempt: Makes the call.
            faults: Most faults of the server; None: any number, where nothing else can be done
                meanwhile. A transfer that moved between two failures begins to count anew.

        Raises:
            Unavailable: If the server was away for `give_up_s`, or `permanent_s` if shorter and the cause lasts.
            DiskFull: Likewise, if it had no room.
            Internal: Likewise, if it answered with a fault of its own; or if it did so `faults` times.
            FedpeftError: Anything else that `attempt` raises without a retry hint, at once.
        """
        timing = self.timing
        backoff, slower = self.backoff(AWAY_GROWTH), Backoff(timing.first_fault_pause_s, timing.longest_pause_s)
        failed, since = 0, 0.0
        asked = self.backoff()
        away: FedpeftError | None = None
        while True:
            began = time.monotonic()
            try:
                result = await attempt()
            except (*NOT_NOW, FAULT) as error:
                now = time.monotonic()
                since = now if away is None else since
                if self._progressed > since:
                    since, failed = self._progressed, 0
                    backoff.reset()
                    slower.reset()
                failed += isinstance(error, FAULT)
                given_up = self.give_up_s is not None and now - since >= self._patient_s(error, self.give_up_s)
                if given_up or (isinstance(error, FAULT) and failed == faults):
                    raise
                self._say_away(error, away)
                away = error
                await (slower if isinstance(error, FAULT) else backoff).pause()
                continue
            except FedpeftError as error:
                self._say_back(away, since)  # a refusal is an answer too
                away = None
                if error.retry_s is None:
                    raise
                self._log.info("retrying as the server asked", reason=error.reason, cause=str(error))
                backoff.reset()
                if self._progressed > began or time.monotonic() - began >= timing.quick_s:
                    asked.reset()
                await self._rest(max(error.retry_s, asked.draw()))  # it may say so at once, for ever
                continue
            self._say_back(away, since)
            return result

    async def _rest(self, hint_s: float) -> None:
        """Sleeps as the server asks, within the bounds of a pause: a hint of 0 must not become a busy loop."""
        bounded_s = min(max(hint_s, self.timing.first_pause_s), self.timing.longest_pause_s)
        await asyncio.sleep(random.uniform(0.5, 1.0) * bounded_s)

    def _patient_s(self, error: FedpeftError, give_up_s: float) -> float:
        return min(give_up_s, self.timing.permanent_s) if getattr(error, "permanent", False) else give_up_s

    def _say_away(self, error: FedpeftError, before: FedpeftError | None) -> None:
        """Says once that the server is away, and at each change what it is that waiting does not mend."""
        event = _event(error)
        if before is None or event != _event(before) or (event == PERMANENT and str(error) != str(before)):
            self._log.warning(event, cause=str(error))

    def _say_back(self, away: FedpeftError | None, since: float) -> None:
        if away is not None:
            self._log.info("server is back", away_s=round(time.monotonic() - since, 1))
