"""Tasks that go to their end: they outlive the calls that began them.

A call whose client disconnects is cancelled, and must not leave half a transition behind: what the database was told in
the cancelled half would be unknown to the memory, and the other way round.
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


async def ended(work: asyncio.Future[R]) -> R:
    """Returns the result of a task or future; if the caller is cancelled it returns at once, and the work goes on.

    Work that must not stop with its caller is awaited through this function and no bare `asyncio.shield`, which drops
    a failure that comes once the caller has left: here it is logged.
    """
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_tell_failure)  # which nobody would see: its caller has left
        raise


def succeeded(work: asyncio.Future[Any]) -> bool:
    """Returns True if work that is over has a result."""
    return not work.cancelled() and work.exception() is None


class TaskSet:
    """The running tasks of one object."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """Starts a task and keeps it until it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self) -> None:
        """Waits until no task is running."""
        while self._tasks:
            await asyncio.wait(self._tasks)


class HasTasks(Protocol):
    """An object with a task set."""

    tasks: TaskSet


S = TypeVar("S", bound=HasTasks)
Method = Callable[Concatenate[S, P], Coroutine[Any, Any, R]]


def shielded(method: Method[S, P, R]) -> Method[S, P, R]:
    """Decorates a method to run to its end even if its caller is cancelled; the caller then returns at once."""

    @wraps(method)
    async def whole(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await ended(self.tasks.start(method(self, *args, **kwargs)))

    return whole


def _tell_failure(step: asyncio.Future[Any]) -> None:
    error = None if step.cancelled() else step.exception()
    if isinstance(error, FedpeftError):
        log.warning("a step failed after its caller had disconnected", message=error.message)
    elif error is not None:
        log.error("a step failed after its caller had disconnected", exc_info=error)
