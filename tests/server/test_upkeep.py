"""What a server does again and again goes on after whatever went wrong with it once."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import DiskFull
from fedpeft_server.upkeep import again


@pytest.mark.parametrize("fault", [DiskFull("no room"), RuntimeError("a fault that nobody foresaw")])
async def test_a_step_that_fails_is_said_and_taken_again(fault: Exception) -> None:
    taken, third = 0, asyncio.Event()

    async def step() -> None:
        nonlocal taken
        taken += 1
        if taken == 1:
            raise fault
        if taken == 3:
            third.set()

    with capture_logs() as said:
        upkeep = asyncio.create_task(again(0.01, step, "it could not be done"))
        await asyncio.wait_for(third.wait(), 5)
        upkeep.cancel()
    assert [line["event"] for line in said] == ["it could not be done"]
