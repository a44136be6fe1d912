"""What a server does again and again while it lives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from fedpeft.errors import FedpeftError

log = structlog.get_logger()


async def again(every_s: float, step: Callable[[], Awaitable[None]], failed: str) -> NoReturn:
    """Takes a step, and after each pause another one; one that fails is said, and the next may do better.

    Args:
        every_s: Pause between two steps, seconds.
        step: What is done.
        failed: What the log says when it cannot be.
    """
    while True:
        try:
            await step()
        except FedpeftError as error:
            log.error(failed, message=error.message)
        except Exception as error:  # nobody waits for this, so its end would never be seen
            log.error(failed, exc_info=error)
        await asyncio.sleep(every_s)
