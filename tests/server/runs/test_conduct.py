"""Clients that take tickets and do not deliver, or whose updates are refused again and again, in a real daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedpeft.rounds.conduct import ASIDE_AFTER
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2

from ..conftest import Daemon, RawClient, StartDaemon, config, filled, refused

POISON = 3e38


async def serve(client: RawClient, value: float, run: str) -> None:
    """Sends an update of one value for every ticket, for ever."""
    while True:
        task = await client.task(run)
        await client.push(task.ticket, filled(value))


async def idle(client: RawClient, run: str) -> None:
    """Takes every ticket and does nothing with it."""
    while True:
        await client.task(run)
        await asyncio.sleep(0.05)


async def held(daemon: Daemon, run: str, clients: list[asyncio.Task[None]], version: int) -> list[run_pb2.Round]:
    try:
        await daemon.until(run, lambda found: found.version >= version, 30)
    finally:
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    return (await daemon.rounds(run))[:version]


async def test_who_takes_tickets_and_does_not_deliver_is_sampled_last(daemon: Daemon) -> None:
    """Each cost a round its deadline; now it is one round in five that they are part of, if that."""
    rounds = {"count": 100, "clients": 2, "quorum": 1, "min_available": 4, "deadline_s": 0.5}
    run = (await daemon.create(config(rounds=rounds))).id
    a, b, c, d = await daemon.clients("a", "b", "idler-1", "idler-2")
    workers = [serve(a, 0.5, run), serve(b, 0.5, run), idle(c, run), idle(d, run)]
    found = await held(daemon, run, [asyncio.create_task(each) for each in workers], 12)
    late = [n for n, r in enumerate(found) if any(t.state == run_pb2.TICKET_STATE_LATE for t in r.tickets)]
    assert late and len(late) <= 5, "they are sampled, and then not for a while"
    assert all({t.client for t in found[n].tickets} == {"a", "b"} for n in set(range(12)) - set(late))


async def test_whose_updates_are_refused_again_and_again_is_set_aside_until_it_is_let_back(
    start: StartDaemon, tmp_path: Path
) -> None:
    daemon = await start()
    rounds = {"count": 100, "clients": 2, "min_available": 3}
    run = (await daemon.create(config(rounds=rounds))).id

    async def three() -> list[asyncio.Task[None]]:
        a, b, mallory = await daemon.clients("a", "b", "mallory")
        return [asyncio.create_task(serve(c, v, run)) for c, v in ((a, 0.5), (b, 0.6), (mallory, POISON))]

    # A client that misses rests for 4, 8, 12 rounds; so many that it was sampled three times all the same.
    found = await held(daemon, run, await three(), 60)
    excluded = [r.number for r in found for t in r.tickets if t.client == "mallory" and t.state != 2]
    assert len(excluded) == ASIDE_AFTER
    assert all(t.client != "mallory" for r in found[excluded[-1] :] for t in r.tickets)
    assert list((await daemon.run(run)).set_aside) == ["mallory"]

    await daemon.end()
    daemon = await start()
    assert list((await daemon.run(run)).set_aside) == ["mallory"], "a restart forgives nothing"
    answers = {c.id: c.answers[0] for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients}
    assert answers["mallory"].set_aside and not answers["a"].set_aside
    before = (await daemon.run(run)).version

    request = op.ReadmitClientRequest(client="mallory")
    assert list((await daemon.operator.ReadmitClient(request)).runs) == [run]
    assert list((await daemon.operator.ReadmitClient(request)).runs) == []
    assert await refused(daemon.operator.ReadmitClient(op.ReadmitClientRequest(client="nobody"))) == "CLIENT_NOT_FOUND"
    assert list((await daemon.run(run)).set_aside) == []
    entries = await daemon.server.store.transact(daemon.server.store.db.transactions.entries_after, 0, 10_000)
    assert [e.action for e in entries if e.action.startswith("client.")] == ["client.set_aside", "client.readmitted"]
    later = await held(daemon, run, await three(), before + 12)
    assert any(t.client == "mallory" for r in later[before:] for t in r.tickets), "it is sampled again"


async def test_a_run_of_no_others_goes_on_with_the_one_that_is_set_aside(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 6, "clients": 3}))).id
    clients = await daemon.clients("a", "b", "mallory")
    workers = [serve(c, POISON if c.name == "mallory" else 0.5, run) for c in clients]
    found = await held(daemon, run, [asyncio.create_task(each) for each in workers], 6)
    assert all([t.state for t in r.tickets] == [2, 2, 4] for r in found)
