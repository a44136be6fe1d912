"""Steps that go to their end: a call whose client leaves is cancelled, and must not leave half a step behind.

What the database was told in the cancelled half would be unknown to the memory, and the other way round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import structlog

from fedpeft.errors import FedpeftError

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")


class Steps:
    """The steps of one object that are under way."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, step: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """Begins a step of its own."""
        task = asyncio.create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def ended(self) -> None:
        """Waits until no step is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)


class Stepping(Protocol):
    """An object with steps."""

    steps: Steps


S = TypeVar("S", bound=Stepping)
Method = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def unbroken(method: Method[S, P, R]) -> Method[S, P, R]:
    """Makes a method go to its end though its caller is cancelled; the caller then leaves at once."""

    @wraps(method)
    async def whole(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        step = self.steps.begin(method(self, *args, **kwargs))
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            step.add_done_callback(_tell_failure)  # which nobody would see: its caller has left
            raise

    return whole


def _tell_failure(step: asyncio.Task[Any]) -> None:
    error = None if step.cancelled() else step.exception()
    if isinstance(error, FedpeftError):
        log.warning("a step failed after its caller had disconnected", message=error.message)
    elif error is not None:
        log.error("a step failed after its caller had disconnected", exc_info=error)
