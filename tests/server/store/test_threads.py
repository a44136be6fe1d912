"""Threads of the store: work of one kind that takes long, or hangs, holds up no work of another kind."""

from __future__ import annotations

import asyncio
from threading import Event

import pytest

from fedpeft_server.runs import aggregation
from fedpeft_server.store import store

from ..conftest import StartDaemon, config, filled

SHORT = config(rounds={"count": 1, "clients": 1})


async def test_a_receipt_is_given_while_as_many_folds_as_there_are_threads_hang(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, go_on, folds = await start(), Event(), list[object]()
    aggregate = aggregation.aggregate

    def hangs(*facts: object) -> object:
        folds.append(facts)
        go_on.wait()
        return aggregate(*facts)  # type: ignore[arg-type]

    monkeypatch.setattr(aggregation, "aggregate", hangs)
    (client,) = await daemon.clients("a")
    try:
        for number in range(store.FOLD_THREADS):
            run = await daemon.create(SHORT, request_id=str(number))
            await client.push((await client.task(run.id)).ticket, filled(1.0))
            async with asyncio.timeout(10):
                while len(folds) <= number:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            last = await daemon.create(SHORT, request_id="last")
            receipt = await client.push((await client.task(last.id)).ticket, filled(1.0))
        assert receipt.sha256
        assert len(folds) == store.FOLD_THREADS, "the fold of the last run waits, and its receipt did not"
    finally:
        go_on.set()
    await daemon.until(last.id, lambda run: run.version == 1)
