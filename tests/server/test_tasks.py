"""Work that outlives its caller: what becomes of its failure."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from threading import Event

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import StateInvalid
from fedpeft_server.store.store import Store


@pytest.mark.parametrize(
    ("error", "level"), [(StateInvalid("the disk is gone"), "warning"), (ValueError("x"), "error")]
)
async def test_a_transaction_that_fails_after_its_caller_left_is_said_once(
    error: Exception, level: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    store, begun, go_on = Store(tmp_path / "data", "", "", keep_updates=False), asyncio.Event(), Event()
    loop, unretrieved = asyncio.get_running_loop(), list[dict[str, object]]()
    loop.set_exception_handler(lambda _, context: unretrieved.append(context))

    def fails() -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(10)
        raise error

    with capture_logs() as lines:
        call = asyncio.create_task(store.transact(fails))
        await begun.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        go_on.set()
        await store.transact(lambda: None)  # transactions follow one another
        await asyncio.sleep(0)
        gc.collect()
    store.close()
    said = [line for line in lines if line["event"] == "a step failed after its caller had disconnected"]
    assert [line["log_level"] for line in said] == [level]
    assert unretrieved == []
