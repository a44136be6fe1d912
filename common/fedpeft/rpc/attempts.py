"""Repetition of a call to a server that is away for a moment, or asks to be called again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc

from fedpeft.errors import FedpeftError, Unavailable

T = TypeVar("T")

BUSY_S = 600.0
"""Longest time that a call is repeated because the server asks for it, without a byte of progress, seconds."""
SAY_S = 5.0
"""After so long it is said why the call waits, once."""


@dataclass(frozen=True)
class Attempts:
    """The attempts of one call.

    Attributes:
        most: Times that the call is made before an unavailable server is given up.
        pause_s: Pause before the second attempt, seconds; doubled before each one after it.
        error: Returns the error of the tree.
        explained: Returns why there is no connection, if that is what is wrong.
        say: Called with a sentence about a call that waits, for people.
    """

    most: int
    pause_s: float
    error: Callable[[grpc.aio.AioRpcError | FedpeftError], FedpeftError]
    explained: Callable[[FedpeftError], Awaitable[FedpeftError]]
    say: Callable[[str], None]

    async def repeat(self, attempt: Callable[[], Awaitable[T]], moved: Callable[[], int] = lambda: 0) -> T:
        """Makes an attempt until it gives an answer; only an unavailable server is worth another.

        A status with a retry hint uses up no attempt: the server is there, and asks to be called again. It is, for
        `BUSY_S` at most, counted anew where an attempt moved bytes.

        Args:
            attempt: Makes the call.
            moved: Returns the bytes that all attempts have moved for good; 0 where each begins anew.

        Raises:
            FedpeftError: The error of the last attempt.
        """
        pause_s, left = self.pause_s, self.most
        since, reached, said = time.monotonic(), moved(), False
        while True:
            try:
                return await attempt()
            except (grpc.aio.AioRpcError, Unavailable) as error:
                cause = self.error(error)
            if cause.retry_s is None:
                left -= 1
                if not isinstance(cause, Unavailable):
                    raise cause
                if not left:
                    raise await self.explained(cause)
                await asyncio.sleep(pause_s)
                pause_s *= 2
                continue
            now = time.monotonic()
            if moved() > reached:
                since, reached = now, moved()
            if now - since >= BUSY_S:
                raise cause
            if now - since >= SAY_S and not said:
                said = True
                self.say(f"the server asks to be called again, for {BUSY_S:g} s at most: {cause.message}")
            await asyncio.sleep(max(cause.retry_s, self.pause_s))
