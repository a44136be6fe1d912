"""Work that is done for as long as a watch finds nothing against it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


async def first_of(work: Coroutine[Any, Any, T], watch: Coroutine[Any, Any, NoReturn]) -> T:
    """Returns what the work returns, or raises what it raises, unless the watch raises first; leaves neither behind.

    Where both end in one instant, work that succeeded is not thrown away, and for work that failed the watch knows why.

    Args:
        work: The work.
        watch: Looks on, and ends by raising why the work is left.
    """
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch)
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        succeeded = working.done() and not working.cancelled() and working.exception() is None
        return await (watching if watching.done() and not succeeded else working)
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
