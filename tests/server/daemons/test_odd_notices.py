"""No caller, and nobody who may write to the database's channel, keeps daemons from hearing each other."""

from __future__ import annotations

import asyncio

from sqlalchemy import text

from fedpeft.v1 import federation_service_pb2 as fed

from ..conftest import config
from .conftest import Federation


async def test_a_client_that_leaves_out_what_is_no_run_hides_nobody_from_other_daemons(federation: Federation) -> None:
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 3}))
    odd, b, c = await federation.clients("odd", "b", "c")
    await odd[0].answer(run.id)
    # Within the bound of the call, and six times as long with the escapes of JSON.
    request = fed.AwaitRoundRequest(left_out=["\1" * 3000, "é" * 64, "", "run.1"])

    async def waits() -> fed.AwaitRoundResponse:
        return await odd[0].stub.AwaitRound(request, metadata=odd[0].metadata)

    waiting = [asyncio.create_task(waits()), asyncio.create_task(b[0].wait(run.id))]
    await federation.until(lambda d: d.server.runs.matching.ready(run.id) == {"odd", "b"})
    assert len({(await each).training.ticket for each in (*waiting, asyncio.create_task(c[1].wait(run.id)))}) == 3
    failures = federation.daemons[0].server.metrics.registry.get_sample_value
    assert not failures("fedpeft_background_failures_total", {"work": "seats"})


async def test_daemons_live_through_notices_that_are_none(federation: Federation) -> None:
    one = federation.daemons[0].server
    texts = ['["x","progress",[1]]', '["x","progress",[["t",1]]]', "[" * 5000, '["x","seats",[[]]]', "hello"]
    with one.store.db.transactions.engine.begin() as connection:
        for odd in texts:
            told = text("SELECT pg_notify('fedpeft_' || current_schema(), :odd)")
            connection.execute(told, {"odd": odd})
    run = await federation.daemons[1].create(config(rounds={"count": 1, "clients": 2}))
    a, b = await federation.clients("a", "b")
    async with asyncio.timeout(5):
        answers = await asyncio.gather(a[0].wait(run.id), b[2].wait(run.id))
    assert {answer.training.run for answer in answers} == {run.id}
    for daemon in federation.daemons:
        assert daemon.server.background.healthy
        assert "x" not in daemon.server.presence._heard
