"""Buffered rounds over the network: tickets outlive their rounds, and each version is made of the next updates."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.config import RunConfig
from fedpeft.errors import RoundClosed, RunFinished, VersionBeingMade
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session

from ...simulated_time.replay import differences
from ..conftest import SPEC, Daemon, RawClient, StartDaemon, config, fault, filled, header, refused, zeros

STALE = np.float32(2**-0.5)
"""Weight of an update that is one version behind."""


def buffered(**rounds: object) -> RunConfig:
    wanted = {"policy": "buffered", "count": 5, "clients": 2, "concurrency": 3, "quorum": 1, **rounds}
    return config(rounds=wanted, aggregation={"strategy": "fedbuff"})


async def begin(daemon: Daemon, names: str = "abc", **rounds: object) -> tuple[str, list[tuple[RawClient, Any]]]:
    """Returns a run, and each client with its ticket for version 0."""
    run = await daemon.create(buffered(**rounds))
    clients = await daemon.clients(*names)
    tasks = await asyncio.gather(*(client.task() for client in clients))
    assert {(task.round, task.version) for task in tasks} == {(1, 0)}
    return run.id, list(zip(clients, tasks, strict=True))


async def committed(daemon: Daemon, run: str, version: int) -> run_pb2.Round:
    await daemon.until(run, lambda found: found.version >= version)
    return next(each for each in await daemon.rounds(run) if each.number == version)


def ages(made: run_pb2.Round) -> dict[str, int]:
    return {c["client"]: c.get("staleness", 0) for c in json.loads(made.record)["contributions"]}


async def verify(daemon: Daemon, run: str) -> list[str]:
    lines = list[str]()
    await verified(Session(daemon.server.settings.listen), run, daemon.server.settings.data_dir / "spool", lines.append)
    return lines


async def test_versions_are_made_of_the_next_updates_whichever_version_they_start_from(start: StartDaemon) -> None:
    daemon = await start(keep_updates=True)
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon)
    await c.pull(run, 0)
    await a.push(for_a.ticket, filled(1.0))
    await b.push(for_b.ticket, filled(3.0))
    first = await committed(daemon, run, 1)
    assert ages(first) == {"a": 0, "b": 0}
    again, (next_a, next_b) = await c.task(), await asyncio.gather(a.task(), b.task())
    assert again == for_c, "a client that asks again has the same task, with the seed and the version of its ticket"
    assert {(task.round, task.version) for task in (next_a, next_b)} == {(2, 1)}
    await c.push(for_c.ticket, filled(4.0))
    await a.push(next_a.ticket, filled(6.0))
    second = await committed(daemon, run, 2)
    assert ages(second) == {"a": 0, "c": 1}
    metrics, size = daemon.server.metrics, 4 * SPEC.parameters
    assert metrics.last_round_bytes.labels(run, "up")._value.get() > 2 * size, "what passed while it was in progress"
    assert [s.value for s in metrics.update_staleness.labels(run)._samples() if s.name == "_sum"] == [1.0]
    weights = {t.client: t.weight for t in second.tickets}
    assert weights["c"] / weights["a"] == pytest.approx(STALE)
    one, two = await daemon.adapter(run, 1), await daemon.adapter(run, 2)
    expected = one["head.weight"] + np.float32((4.0 * 2**-0.5 + 6.0) / 2)
    np.testing.assert_allclose(two["head.weight"], expected, rtol=1e-6)
    await b.push(next_b.ticket, filled(1.0))
    await daemon.operator.PauseRun(op.PauseRunRequest(run=run))
    assert await verify(daemon, run) == [f"round {n}: record, version and replay agree" for n in (1, 2)]


async def test_rounds_show_the_tickets_that_they_counted_and_the_one_in_progress_those_at_work(daemon: Daemon) -> None:
    run, ((a, for_a), (b, for_b), (_, for_c)) = await begin(daemon)
    for client, task in ((a, for_a), (b, for_b)):
        await client.pull(run, 0)
        await client.push(task.ticket, filled(1.0))
    done = await committed(daemon, run, 1)
    assert [(t.client, t.base_version) for t in done.tickets] == [("a", 0), ("b", 0)]
    size = 4 * SPEC.parameters
    assert (done.payload_bytes_up, done.payload_bytes_down) == (2 * size, 2 * size)
    assert {(await each.task()).version for each in (a, b)} == {1}
    now = (await daemon.rounds(run))[-1]
    assert (now.number, now.phase, now.base_version) == (2, run_pb2.ROUND_PHASE_OPEN, 1)
    known = {t.client: (t.id, t.state, t.base_version) for t in now.tickets}
    assert known["c"] == (for_c.ticket, run_pb2.TICKET_STATE_ISSUED, 0)
    assert known["a"][1:] == (run_pb2.TICKET_STATE_ISSUED, 1)
    reason = (await daemon.run(run)).reason
    assert reason.startswith(f"round 2 of {run} has 0 of 2 updates and awaits a, b, c (from version 0), ")


async def test_an_update_too_many_versions_behind_is_late_with_the_reason(daemon: Daemon) -> None:
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon, max_staleness=0)
    await a.push(for_a.ticket, filled(1.0))
    await b.push(for_b.ticket, filled(1.0))
    await committed(daemon, run, 1)
    assert await refused(c.push(for_c.ticket, filled(1.0))) == "ROUND_CLOSED"
    standing = await c.upload(for_c.ticket)
    assert standing.state == run_pb2.TICKET_STATE_LATE
    assert standing.reason == "more than 0 versions came after version 0, from which it starts"
    assert (await c.task()).version == 1, "its place is free, and it gets it again"


async def test_a_restarted_daemon_goes_on_with_tickets_of_earlier_rounds_and_what_arrived_for_them(
    start: StartDaemon,
) -> None:
    daemon = await start()
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon)
    manifest, data = payload.encode(filled(2.0), SPEC.sent(1), "float32")
    assert await refused(c.push_raw(header(for_c.ticket, manifest), [(0, data[:9])])) == "UPLOAD_INCOMPLETE"
    await a.push(for_a.ticket, filled(1.0))
    await b.push(for_b.ticket, filled(1.0))
    await committed(daemon, run, 1)
    assert (await c.upload(for_c.ticket, manifest.sha256)).committed_bytes == 9
    await daemon.end()
    daemon = await start()
    a, b, c = await daemon.clients("a", "b", "c")
    assert await c.task() == for_c
    assert (await c.upload(for_c.ticket, manifest.sha256)).committed_bytes == 9
    receipt = await c.push_raw(header(for_c.ticket, manifest), [(9, data[9:])])
    assert receipt == await c.push(for_c.ticket, filled(2.0))
    await a.push((await a.task()).ticket, filled(1.0))
    assert ages(await committed(daemon, run, 2)) == {"a": 0, "c": 1}


async def test_an_update_that_comes_while_a_version_is_made_gets_its_receipt_once_it_counts_in_the_next(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon, clients=1)
    release, fold = asyncio.Event(), daemon.server.store.fold

    async def slowly(function: Any, *arguments: Any) -> Any:
        await release.wait()
        return await fold(function, *arguments)

    monkeypatch.setattr(daemon.server.store, "fold", slowly)
    await a.push(for_a.ticket, filled(1.0))
    others = [asyncio.create_task(x.push(task.ticket, filled(2.0))) for x, task in ((b, for_b), (c, for_c))]
    await asyncio.sleep(0.2)
    assert not any(each.done() for each in others)
    release.set()
    assert {receipt.ticket for receipt in await asyncio.gather(*others)} == {for_b.ticket, for_c.ticket}
    made = [await committed(daemon, run, number) for number in (2, 3)]
    assert sorted(client for each in made for client in ages(each)) == ["b", "c"], "a version each"


async def test_a_paused_run_that_cannot_fold_has_later_updates_asked_for_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ((a, for_a), (b, for_b), _) = await begin(daemon, clients=1)
    fold = daemon.server.store.fold

    async def broken(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(daemon.server.store, "fold", broken)
    await a.push(for_a.ticket, filled(1.0))
    await daemon.until(run, lambda found: found.state == run_pb2.RUN_STATE_PAUSED)
    assert isinstance(await fault(b.push(for_b.ticket, filled(2.0))), VersionBeingMade)
    assert (await b.upload(for_b.ticket)).state == run_pb2.TICKET_STATE_ISSUED
    monkeypatch.setattr(daemon.server.store, "fold", fold)
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
    await committed(daemon, run, 1)
    await b.push(for_b.ticket, filled(2.0))
    assert ages(await committed(daemon, run, 2)) == {"b": 1}


async def test_a_daemon_that_ends_while_a_version_is_made_keeps_nobody_waiting(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start(drain_s=5)
    run, ((a, for_a), (b, for_b), _) = await begin(daemon, clients=1)
    release, fold = asyncio.Event(), daemon.server.store.fold

    async def slowly(function: Any, *arguments: Any) -> Any:
        await release.wait()
        return await fold(function, *arguments)

    monkeypatch.setattr(daemon.server.store, "fold", slowly)
    await a.push(for_a.ticket, filled(1.0))
    held = asyncio.create_task(b.push(for_b.ticket, filled(2.0)))
    await asyncio.sleep(0.2)
    ending = asyncio.create_task(daemon.end())
    async with asyncio.timeout(5):
        assert isinstance(await fault(held), VersionBeingMade)
    release.set()
    await ending
    daemon = await start()
    (b,) = await daemon.clients("b")
    assert (await b.upload(for_b.ticket)).state == run_pb2.TICKET_STATE_ISSUED
    await b.push(for_b.ticket, filled(2.0))
    assert ages(await committed(daemon, run, 2)) == {"b": 1}


async def test_the_place_of_a_client_that_died_is_given_away_and_its_update_still_counts(daemon: Daemon) -> None:
    run, ((a, for_a), (b, for_b)) = await begin(daemon, "ab", concurrency=2, deadline_s=0.5, max_extensions=1000)
    (d,) = await daemon.clients("d")
    await a.push(for_a.ticket, filled(1.0))
    assert (await d.task()).round == 1, "the place of a"
    (e,) = await daemon.clients("e")
    async with asyncio.timeout(10):
        assert (await e.task()).round in (1, 2), "that of b or d, of which nothing came for deadline_s"
    await b.push(for_b.ticket, filled(1.0))
    made = [await committed(daemon, run, 1)]
    found = {client for each in await daemon.rounds(run) for client in _received(each)}
    assert {"a", "b"} <= found, made


def _received(each: run_pb2.Round) -> list[str]:
    return [t.client for t in each.tickets if t.state == run_pb2.TICKET_STATE_RECEIVED]


async def test_when_nobody_sends_the_round_is_extended_and_then_the_run_paused_by_name(daemon: Daemon) -> None:
    run, ((a, for_a), *_) = await begin(daemon, quorum=2, deadline_s=0.3, max_extensions=1)
    await a.push(for_a.ticket, filled(1.0))
    paused = await daemon.until(run, lambda found: found.state == run_pb2.RUN_STATE_PAUSED)
    assert paused.reason.startswith("round 1 has 1 of the 2 updates it needs after 1 extension; still awaited: b, c")
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
    assert (await daemon.run(run)).state == run_pb2.RUN_STATE_RUNNING


async def test_a_rollback_takes_all_tickets_back_and_a_stop_leaves_none(daemon: Daemon) -> None:
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon)
    await a.push(for_a.ticket, filled(1.0))
    await b.push(for_b.ticket, filled(1.0))
    await committed(daemon, run, 1)
    await daemon.operator.RollbackRun(op.RollbackRunRequest(run=run, version=0))
    assert await refused(c.push(for_c.ticket, filled(1.0))) == "TICKET_CLOSED"
    assert "rolled back to version 0" in (await c.upload(for_c.ticket)).reason
    later = await c.task()
    assert (later.round, later.version) == (3, 2)
    assert all(np.array_equal(x, zeros()[name]) for name, x in (await daemon.adapter(run, 2)).items())
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    assert (await c.upload(later.ticket)).run_finished
    assert await refused(c.push(later.ticket, filled(1.0))) == "ROUND_CLOSED"


async def test_a_client_that_gives_a_ticket_of_an_earlier_round_back_has_another_after_an_extension(
    daemon: Daemon,
) -> None:
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon, deadline_s=0.5, max_extensions=1000, quorum=2)
    await a.push(for_a.ticket, filled(1.0))
    await b.push(for_b.ticket, filled(1.0))
    await committed(daemon, run, 1)
    await c.withdraw(for_c.ticket, "its disk is full")
    another = await c.task()
    assert (another.round, another.version) == (2, 1)
    assert another.ticket != for_c.ticket
    assert (await c.upload(for_c.ticket)).state == run_pb2.TICKET_STATE_WITHDRAWN
    rounds = {each.number: {t.id for t in each.tickets} for each in await daemon.rounds(run)}
    assert for_c.ticket in rounds[1] and another.ticket in rounds[2]
    await daemon.end()


async def test_a_run_of_many_hands_is_made_again_from_the_order_of_receipt(start: StartDaemon, tmp_path: Path) -> None:
    """Clients of unlike pace, one that dies, and a daemon that is started again: the pure core makes the same bytes."""
    daemon = await start(keep_updates=True)
    names, drawn = "abcdef", random.Random(7)
    run = (await daemon.create(buffered(count=12, concurrency=4, max_staleness=3, min_available=2))).id

    async def work(client: RawClient) -> None:
        while True:
            answer = await client.wait(run)
            if answer.idle.finished:
                return
            if not answer.HasField("training"):
                continue
            task, pace = answer.training, 0.01 if client.name in "ab" else 0.1
            await client.pull(run, task.version)
            await asyncio.sleep(drawn.uniform(0.0, pace))
            if client.name == "f" and task.round > 1:
                return  # it dies with a ticket
            with suppress(RoundClosed, RunFinished):
                await client.push(task.ticket, filled(drawn.uniform(-1.0, 1.0)))

    async def all_work() -> None:
        await asyncio.gather(*map(work, await daemon.clients(*names)))

    working = asyncio.create_task(all_work())
    await committed(daemon, run, 4)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await daemon.end()
    daemon = await start(keep_updates=True)
    working = asyncio.create_task(all_work())
    await daemon.until(run, lambda found: found.state == run_pb2.RUN_STATE_COMPLETED, 30)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    rounds = await daemon.rounds(run)
    assert max(age for each in rounds for age in ages(each).values()) > 0, "some were stale"
    assert await verify(daemon, run) == [f"round {n}: record, version and replay agree" for n in range(1, 13)]
    await daemon.end()
    assert list(differences(daemon.server.settings.data_dir, tmp_path / "replay")) == []


async def test_the_last_version_ends_the_run_for_those_at_work(daemon: Daemon) -> None:
    run, ((a, for_a), (b, for_b), (c, for_c)) = await begin(daemon, count=1)
    await a.push(for_a.ticket, filled(1.0))
    await b.push(for_b.ticket, filled(1.0))
    await daemon.until(run, lambda found: found.state == run_pb2.RUN_STATE_COMPLETED)
    standing: fed.GetUploadResponse = await c.upload(for_c.ticket)
    assert (standing.state, standing.run_finished) == (run_pb2.TICKET_STATE_LATE, True)
    (done,) = await daemon.rounds(run)
    assert sorted(t.client for t in done.tickets) == ["a", "b", "c"]
