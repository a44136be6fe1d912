"""Tasks that go to their end, as they outlive the calls that began them; and threads that are left behind at the end.

A call whose client disconnects is cancelled, and must not leave half a transition behind: what the database was told in
the cancelled half would be unknown to the memory, and the other way round.

A thread that asks an object store may wait for minutes. Python waits for it, as its pool is shut down and again as the
interpreter ends; but what is durable by then is all that counts, as after a kill.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import structlog

from fedpeft.errors import FedpeftError

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")

END_S = 5.0
"""Time that threads have to end when the daemon does."""


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


def end_within(seconds: float, end: Callable[[], None]) -> None:
    """Ends threads; goes on without them, and says so, if that takes too long.

    Args:
        seconds: Time for it.
        end: Waits for them.
    """
    ending = threading.Thread(target=end, name="end", daemon=True)
    ending.start()
    ending.join(seconds)
    if ending.is_alive():
        log.warning("a store or the database gives no answer; it is not waited for", seconds=seconds)


def leave_behind(code: int) -> None:
    """Ends the process at once, with an exit code, if there are threads that it would wait for."""
    if any(not each.daemon and each is not threading.current_thread() for each in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_failure(step: asyncio.Future[Any]) -> None:
    error = None if step.cancelled() else step.exception()
    if isinstance(error, FedpeftError):
        log.warning("a step failed after its caller had disconnected", message=error.message)
    elif error is not None:
        log.error("a step failed after its caller had disconnected", exc_info=error)
