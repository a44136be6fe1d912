"""Background work of the daemon, all of it supervised: a failure that no call would see is never silent.

Everything that runs beside the calls is begun here, in one of three ways.

    supervise  must last as long as the daemon: one that ends ends the daemon, with an exit code other than 0
    begin      ends by itself; a failure that it did not deal with ends the daemon likewise
    every      a step that is repeated; a failed step is repeated too, and meanwhile health says NOT_SERVING if nobody
               foresaw the failure (it is none of FedPEFT's errors: no full disk, no locked database), or the database
               is out of reach

Every failure is in the log and in `fedpeft_background_failures_total`. Ending is right where work cannot go on: all
that counts is durable, so a service manager that starts the daemon again loses nothing, while one that only seems to
serve holds every client up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import structlog

from fedpeft.errors import DatabaseUnavailable, FedpeftError, Internal
from fedpeft_server.metrics import Metrics

log = structlog.get_logger()

T = TypeVar("T")


class Background:
    """The background work of one daemon.

    Args:
        metrics: Metrics in which failures are counted.
        end: Has the daemon end; called when something cannot go on.

    Attributes:
        fault: Reason for which the daemon must end; None while it need not.
        changed: Set whenever `healthy` may have changed.
    """

    def __init__(self, metrics: Metrics, end: Callable[[], None]) -> None:
        self.fault: FedpeftError | None = None
        self.changed = asyncio.Event()
        self._metrics = metrics
        self._end = end
        self._failing: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._kept: set[asyncio.Task[Any]] = set()

    @property
    def healthy(self) -> bool:
        """True if all of it goes on, and no repeated work fails for an unforeseen reason or for the database."""
        return self.fault is None and not self._failing

    def supervise(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Starts work that must last until `close`; its end is a fault. `name` is its name in logs and metrics."""
        task = self.begin(name, work)
        self._kept.add(task)
        return task

    def begin(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins work that ends by itself."""
        return self.watch(name, asyncio.create_task(work))

    def watch(self, name: str, task: asyncio.Task[T]) -> asyncio.Task[T]:
        """Watches over work that somebody else began, and that ends by itself."""
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def every(self, name: str, seconds: float, step: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Begins work that takes a step, and after each pause another one."""

        async def repeat() -> None:
            while True:
                with self.attempt(name):
                    await step()
                await asyncio.sleep(seconds)

        return self.supervise(name, repeat())

    @contextmanager
    def attempt(self, name: str, run: str = "") -> Iterator[None]:
        """Says that the block failed where it does, and goes on; for what is tried again. `run` is whose work it is."""
        try:
            yield
        except FedpeftError as error:
            self._metrics.background_failures.labels(name).inc()
            log.error("background work failed; retrying", work=name, run=run, message=error.message)
            if isinstance(error, DatabaseUnavailable):
                self._fails(name, run)
        except Exception as error:
            self._metrics.background_failures.labels(name).inc()
            log.error("background work failed; retrying", work=name, run=run, exc_info=error)
            self._fails(name, run)
        else:
            if (name, run) in self._failing:
                log.info("background work succeeds again", work=name, run=run)
                self._failing.discard((name, run))
                self.changed.set()

    def _fails(self, name: str, run: str) -> None:
        self._failing.add((name, run))
        self.changed.set()

    def give_up(self, fault: FedpeftError) -> None:
        """Has the daemon end, with a fault that an operator must mend."""
        log.critical("the server shuts down", message=fault.message)
        self.fault = self.fault or fault
        self.changed.set()
        self._end()

    def forget(self, run: str) -> None:
        """Forgets what failed for a run that is over: nobody will try that again."""
        self._failing = {failing for failing in self._failing if failing[1] != run}
        self.changed.set()

    @contextmanager
    def taking_unhandled(self) -> Iterator[None]:
        """Takes, while the block lasts, what the event loop has no other place for."""
        loop = asyncio.get_running_loop()
        before = loop.get_exception_handler()
        loop.set_exception_handler(self._unhandled)
        try:
            yield
        finally:
            loop.set_exception_handler(before)

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Counts and logs a callback that raised, or a task that failed and that nobody asked for."""
        self._metrics.background_failures.labels("event loop").inc()
        log.error(
            "background work failed", work="event loop", what=context["message"], exc_info=context.get("exception")
        )

    async def close(self) -> None:
        """Ends what was kept, and waits until the rest has ended."""
        kept, self._kept = self._kept, set()
        for task in kept:
            task.cancel()
        while self._tasks:  # one may begin another
            await asyncio.wait(self._tasks)  # `_done` says what failed

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        kept = task in self._kept
        error = None if task.cancelled() else task.exception()
        if error is None and not kept:
            return
        name, what = task.get_name(), f"{type(error).__name__}: {error}" if error else "it ended"
        self._metrics.background_failures.labels(name).inc()
        log.critical("background work failed for good; the server shuts down", work=name, exc_info=error)
        self.fault = self.fault or Internal(f"background work {name!r} failed: {what}; the log has the details")
        self.changed.set()
        self._end()
