"""An event loop whose time is simulated, and the machines that live in it.

Whatever happens on a machine, a callback of the loop or work on a thread, carries the machine's life in its context.
When the machine dies, nothing of that life runs any more, exactly as after SIGKILL: no handler, no `finally`.

Work on threads runs in the loop, a drawn moment after it was asked for; that of a pool with one thread in order. Time
passes only when nobody has anything to do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import random
import selectors
import time
from collections.abc import Callable
from typing import Any

LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)
"""The life that code belongs to; None for the world around the machines."""

LATENCY_S = 0.02
"""Most that work on a thread waits for its turn."""


class Stuck(Exception):
    """Nobody has anything to do any more, and nobody waits for a moment."""


class Life:
    """One process from its start to its end.

    Attributes:
        is_over: True once it was killed.
        effects: Effects on its disk so far.
        wall_s: Error of the machine's clock.
    """

    def __init__(self, name: str, wall_s: float = 0.0) -> None:
        self.name = name
        self.is_over = False
        self.effects = 0
        self.wall_s = wall_s


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Runs everything of a world, in an order that its seed decides."""

    def __init__(self, drawn: random.Random, begins: float) -> None:
        self.now = 0.0
        self._begins = begins
        self._drawn = drawn
        self._turns: dict[Any, float] = {}
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Returns the simulated time, in seconds."""
        return self.now

    def wall(self) -> float:
        """Returns the time of day on the machine whose code asks."""
        life = LIFE.get()
        return self._begins + self.now + (life.wall_s if life else 0.0)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None) -> Any:
        """See the base class; a callback of a life that is over does not run."""
        context = contextvars.copy_context() if context is None else context
        return super().call_soon(_alive(callback, context), *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Any:
        """See the base class; likewise."""
        context = contextvars.copy_context() if context is None else context
        return super().call_at(when, _alive(callback, context), *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        """Runs work of a thread in this one, a moment later."""
        future = self.create_future()

        def work() -> None:
            if future.cancelled() and self._drawn.random() < 0.5:
                return  # its thread had not begun
            try:
                result = func(*args)
            except BaseException as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        self.call_at(self._turn(executor), work)
        return future

    def submit(self, executor: Any, func: Callable[..., Any]) -> concurrent.futures.Future[Any]:
        """Runs work likewise, for who asks the pool itself."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def work() -> None:
            try:
                future.set_result(func())
            except BaseException as error:
                future.set_exception(error)

        self.call_at(self._turn(executor), work)
        return future

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: Any) -> None:
        """Ignores it: nobody sends signals here."""

    def remove_signal_handler(self, sig: int) -> bool:
        """Ignores it likewise."""
        return True

    def _turn(self, executor: Any) -> float:
        due = self.now + self._drawn.uniform(0.0, LATENCY_S)
        if getattr(executor, "threads", 0) == 1:
            due = self._turns[executor] = max(due, self._turns.get(executor, 0.0) + 1e-6)
        return due


class Pool:
    """Stands for `ThreadPoolExecutor`."""

    def __init__(self, threads: int, name: str = "") -> None:
        self.threads = threads

    def submit(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Has work done."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, SimulatedLoop)
        return loop.submit(self, lambda: func(*args, **kwargs))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Does nothing: there are no threads."""


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Lets the time pass until the next moment that somebody waits for."""

    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if not events and timeout is None:
            raise Stuck
        if not events and timeout:
            self._loop.now += timeout
        return events


def _alive(callback: Callable[..., object], context: contextvars.Context) -> Callable[..., object]:
    life = context.get(LIFE)
    if life is None:
        return callback

    def run(*args: Any) -> None:
        if not life.is_over:
            callback(*args)

    return run


def take_over_time(loop: SimulatedLoop) -> None:
    """Has this process see simulated time; for a process that ends with the world."""
    time.time = loop.wall
    time.monotonic = time.perf_counter = loop.time
    time.time_ns = lambda: int(loop.wall() * 1e9)  # type: ignore[assignment]
