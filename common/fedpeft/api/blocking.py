"""An event loop in a thread of its own, for callers that are not asynchronous; a notebook has one running already."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from functools import cache
from typing import Any, Final, TypeVar

LEAVE_S = 5.0
"""Longest that work which was interrupted is waited for."""

T = TypeVar("T")
_END: Final = object()


_starting = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """Returns the loop, one for the process; its thread ends with it."""
    with _starting:  # `cache` alone would let the first calls of two threads start two
        return _started()


@cache
def _started() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="fedpeft", daemon=True).start()
    return loop


def do(work: Coroutine[Any, Any, T]) -> T:
    """Does asynchronous work and returns what comes of it; Ctrl-C ends the work first, which may have to clean up."""
    ended = threading.Event()

    async def worked() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(worked(), _loop())
    try:
        return future.result()
    except BaseException:
        if future.cancel():  # else it is the work's own error
            ended.wait(LEAVE_S)
        raise


def stream(source: AsyncGenerator[T, None]) -> Iterator[T]:
    """Yields what an asynchronous generator yields, and closes it once the caller has enough."""

    async def next_one() -> Any:
        return await anext(source, _END)

    try:
        while (item := do(next_one())) is not _END:
            yield item
    finally:
        do(source.aclose())
