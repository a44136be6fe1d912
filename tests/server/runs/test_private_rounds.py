"""Rounds with noise at the server: each version is of one draw, and the budget is that of the committed rounds."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import grpc
import numpy as np
import obstore
import pytest
from dp_accounting.pld import PLDAccountant

from fedpeft.adapters import payload
from fedpeft.api import views
from fedpeft.config import RunConfig
from fedpeft.privacy.events import Noised
from fedpeft.rounds import record
from fedpeft.rounds.state_machine import Round
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.runs import aggregation
from fedpeft_server.sharing.fold_lease import FoldLease
from fedpeft_server.store.rows import RunState

from ...ports import free_port
from ..conftest import SPEC, Daemon, RawClient, StartDaemon, config, filled, header
from ..test_process import running
from .two_servers import CONFIG, Cluster, Server, check

Z, DELTA = 20.0, 1e-5
PRIVACY: dict[str, object] = {"clip_norm": 5.0, "mechanism": "central", "noise_multiplier": Z, "delta": DELTA}


def on_paper(rounds: int, z: float = Z) -> float:
    """Returns the epsilon of so many rounds, composed by hand."""
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(dp_accounting.GaussianDpEvent(z), rounds)
    return accountant.get_epsilon(DELTA)


def private(count: int = 3, **privacy: object) -> RunConfig:
    return config(rounds={"count": count, "clients": 2, "quorum": 2}, privacy={**PRIVACY, **privacy})


async def hold(daemon: Daemon, run: str, clients: list[RawClient], value: float = 0.5) -> None:
    """Has clients use their tickets of the next round."""
    async with asyncio.timeout(20):
        tasks = await asyncio.gather(*(client.task(run) for client in clients))
        for client, task in zip(clients, tasks, strict=True):
            await client.push(task.ticket, filled(value))


async def whole(daemon: Daemon, run: str) -> views.Json:
    return views.run_json(await daemon.run(run), await daemon.rounds(run), None)


def files(daemon: Daemon) -> list[str]:
    return sorted(path.name for path in (daemon.server.settings.data_dir / "blobs").rglob("*.safetensors"))


async def test_a_round_with_noise_says_what_it_spent(start: StartDaemon) -> None:
    daemon = await start()
    run = (await daemon.create(private())).id
    clients = await daemon.clients("a", "b")
    for number in (1, 2):
        await hold(daemon, run, clients)
        await daemon.until(run, lambda r, n=number: r.version == n)
    shown = await whole(daemon, run)
    assert [row["metrics"]["privacy_epsilon"] for row in shown["rounds"]] == pytest.approx(
        [on_paper(1), on_paper(2)], abs=1e-9
    )
    assert shown["privacy"] == {
        "mechanism": "central",
        "unit": "client",
        "relation": "zero-out",
        "epsilon": pytest.approx(on_paper(2), abs=1e-9),
        "delta": DELTA,
        "target_epsilon": None,
        "noise_multiplier": Z,
    }
    read = record.parse((await daemon.rounds(run))[0].record)
    assert [contributed.weight for contributed in read.contributions] == [1.0, 1.0]
    kinds = [{"bound": e.bound, "count": e.count, "kind": e.kind} for e in read.events]
    assert kinds == [{"bound": 5.0, "count": 2, "kind": k} for k in ("clipped", "noised")]
    values = np.concatenate([v.reshape(-1) for v in (await daemon.adapter(run, 1)).values()]) - 0.5
    assert 20 < values.std() < 100, "the noise of the mean of two is 20 x 5 / 2"
    gauge = daemon.server.metrics.privacy_epsilon.labels(run)._value
    assert gauge.get() == pytest.approx(on_paper(2), abs=1e-9)
    await daemon.operator.RollbackRun(op.RollbackRunRequest(run=run, version=1, reason="worse"))
    assert gauge.get() == pytest.approx(on_paper(2), abs=1e-9), "what was published stays published"
    await daemon.end()
    again = await start()
    assert again.server.metrics.privacy_epsilon.labels(run)._value.get() == pytest.approx(on_paper(2), abs=1e-9)


async def test_the_epsilon_of_clients_that_noise_is_that_of_the_one_that_spent_most_in_any_round(
    start: StartDaemon,
) -> None:
    daemon = await start()
    local = {**PRIVACY, "mechanism": "local", "noise_multiplier": 60.0}
    run = (await daemon.create(config(rounds={"count": 9, "clients": 1, "quorum": 1}, privacy=local))).id
    (client,) = await daemon.clients("a")
    for number, spent in enumerate((1.0, 3.0, 2.0), 1):  # of clients that are sampled in turn
        manifest, data = payload.encode(filled(0.5), SPEC.sent(number), "float32")
        ticket = (await client.task(run)).ticket
        await client.push_raw(header(ticket, manifest, privacy_epsilon=spent), [(0, data)])
        await daemon.until(run, lambda r, n=number: r.version == n)

    async def figures() -> list[float]:
        return [row["metrics"]["privacy_epsilon"] for row in (await whole(daemon, run))["rounds"]]

    gauge = daemon.server.metrics.privacy_epsilon.labels(run)._value
    assert await figures() == [1.0, 3.0, 3.0] and gauge.get() == 3.0
    await daemon.operator.RollbackRun(op.RollbackRunRequest(run=run, version=1, reason="worse"))
    assert await figures() == [1.0, 3.0, 3.0, 3.0] and gauge.get() == 3.0
    await daemon.end()
    daemon = await start()
    assert daemon.server.metrics.privacy_epsilon.labels(run)._value.get() == 3.0
    assert (await whole(daemon, run))["privacy"]["epsilon"] == 3.0


async def test_buffered_rounds_are_composed_plainly_and_a_client_is_once_in_each(daemon: Daemon) -> None:
    """A stale update is a function of a version that was published, so the versions compose as those of any rounds."""
    rounds = {"policy": "buffered", "count": 3, "clients": 2, "concurrency": 3, "quorum": 2}
    run = (await daemon.create(config(rounds=rounds, privacy=PRIVACY))).id
    a, b, c = await daemon.clients("a", "b", "c")
    first = await asyncio.gather(*(client.task() for client in (a, b, c)))
    await a.push(first[0].ticket, filled(0.5))
    await b.push(first[1].ticket, filled(0.5))
    await daemon.until(run, lambda found: found.version == 1)
    again = await asyncio.gather(a.task(), b.task())
    await c.push(first[2].ticket, filled(0.5))
    await a.push(again[0].ticket, filled(0.5))
    await daemon.until(run, lambda found: found.version == 2)
    *_, done = [each for each in await daemon.rounds(run) if each.record]
    made = record.parse(done.record)
    assert [(each.client, each.weight, each.staleness) for each in made.contributions] == [("a", 1.0, 0), ("c", 1.0, 1)]
    (noised,) = [event for event in made.events if isinstance(event, Noised)]
    assert (noised.noise_multiplier, noised.divisor, noised.count) == (Z, 2, 2)
    assert done.metrics["privacy_epsilon"] == pytest.approx(on_paper(2), rel=1e-3)


async def test_noise_is_worked_out_when_the_run_is_created_and_its_rounds_keep_to_the_target(
    start: StartDaemon,
) -> None:
    daemon = await start()
    privacy = {**PRIVACY, "noise_multiplier": None, "target_epsilon": 2.0}
    made = await daemon.create(config(rounds={"count": 2, "clients": 1}, privacy=privacy))
    z = made.config.privacy.noise_multiplier
    assert on_paper(2, z) <= 2.0 < on_paper(2, z - 1e-4)
    clients = await daemon.clients("a")
    for number in (1, 2):
        await hold(daemon, made.id, clients)
        await daemon.until(made.id, lambda r, n=number: r.version == n)
    shown = await whole(daemon, made.id)
    assert shown["state"] == "completed" and shown["privacy"]["epsilon"] == pytest.approx(on_paper(2, z), abs=1e-9)


async def test_a_run_that_would_spend_more_is_paused_and_says_so(start: StartDaemon) -> None:
    daemon = await start()
    limit = (on_paper(1) + on_paper(2)) / 2
    run = (await daemon.create(private(target_epsilon=limit))).id
    clients = await daemon.clients("a", "b")
    await hold(daemon, run, clients)
    found = await daemon.until(run, lambda r: r.version == 1)
    assert views.state(found) == "paused" and "budget is spent: with round 2 epsilon would be" in found.reason
    assert "privacy.target_epsilon" in found.reason
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
    await hold(daemon, run, clients)
    found = await daemon.until(run, lambda r: views.state(r) == "paused")
    assert found.version == 1 and "with round 2" in found.reason, "nothing more is published, whoever resumes it"
    assert [name for name in files(daemon) if name.startswith("000002")] == []


async def test_a_bound_that_adapts_goes_from_round_to_round(start: StartDaemon) -> None:
    daemon = await start()
    run = (await daemon.create(private(quantile=0.5, clip_norm=100.0, noise_multiplier=0.5))).id
    clients = await daemon.clients("a", "b")
    for number in (1, 2):
        await hold(daemon, run, clients, 1000.0)  # a norm of more than 4,000 is not refused, but scaled
        await daemon.until(run, lambda r, n=number: r.version == n)
    first, second = [record.parse(each.record) for each in await daemon.rounds(run) if each.record]
    noised, adapted = first.events
    assert noised.kind == "noised" and adapted.kind == "adapted" and noised.bound == 100.0
    assert second.events[0].kind == "noised" and second.events[0].bound == adapted.bound != 100.0
    assert second.contributions[0].weight < 0.1


async def test_of_two_servers_that_draw_noise_for_a_round_one_commits_its_own(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def without(self: FoldLease) -> int:
        return 0

    monkeypatch.setattr(FoldLease, "take", without)  # by which one of them would wait for the other
    given = CONFIG.model_dump(exclude_none=True) | {"privacy": PRIVACY}
    run = (await cluster.create(config(**given))).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    folds, both, fold = list[str](), asyncio.Barrier(2), aggregation.Folding._fold_round

    async def together(self: aggregation.Folding, folding: Round) -> Any:
        await both.wait()
        found = await fold(self, folding)
        folds.append(found.outcome.made.sha256)
        await both.wait()
        return found

    monkeypatch.setattr(aggregation.Folding, "_fold_round", together)
    await one.offer("ab")
    await two.engine.refresh()
    await one.receive("a", 1)
    await two.receive("b", 1)
    await one.engine.refresh()
    async with asyncio.timeout(20):
        await asyncio.gather(one.idle(), two.idle())
    await asyncio.gather(one.close(), two.close())
    assert len(set(folds)) == 2, "each drew its own"
    check(cluster.stores[0], run, [])
    assert cluster.database.run(run).state is RunState.RUNNING
    assert cluster.database.version(run, 1).sha256 in folds
    there = [each["path"] for batch in obstore.list(cluster.stores[0].blobs._store, "runs") for each in batch]
    assert len([key for key in there if "/000001" in key]) == 1, "what the other one drew is gone"


async def keep_working(port: int, run: str, until: Callable[[int], bool]) -> None:
    """Two clients work for a daemon that may end at any time, until one of its versions is enough."""
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    clients, done = [RawClient(channel, name) for name in ("a", "b")], asyncio.Event()

    async def work(client: RawClient) -> None:
        while not done.is_set():
            try:
                await client.register()
                while True:
                    task = await client.task(run)
                    if until(task.version):
                        done.set()
                        return
                    await client.push(task.ticket, filled(0.5))
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.02)

    await asyncio.gather(*map(work, clients))
    await channel.close()


@pytest.mark.usefixtures("preloaded")
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
async def test_after_kills_the_epsilon_is_that_of_the_rounds_that_were_published(tmp_path: Path, kills: int) -> None:
    """The daemon is killed at times that are drawn, most of them between the drawing of noise and the commit."""
    port, drawn = free_port(), random.Random(kills)
    folder, flags = tmp_path / "data", ("--metrics", "")
    run, spec = "", SPEC
    for kill in range(kills + 1):
        with running(folder, *flags, port=port) as process:
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            daemon = Daemon(None, channel, None)  # type: ignore[arg-type]
            if not run:
                run = (await daemon.create(private(100_000), spec)).id
            known = (await daemon.run(run)).version
            working = asyncio.create_task(keep_working(port, run, lambda version, k=known: version >= k + 3))
            if kill < kills:
                await asyncio.wait({working}, timeout=drawn.uniform(0.05, 1.5))
                working.cancel()
                process.send_signal(signal.SIGKILL)
            else:
                async with asyncio.timeout(60):
                    await working
                shown = await whole(daemon, run)
            await asyncio.gather(working, return_exceptions=True)
            await channel.close()
    version = shown["version"]
    assert version >= 3 and len(shown["rounds"]) == version
    assert shown["privacy"]["epsilon"] == pytest.approx(on_paper(version), abs=1e-9)
    assert all(row["metrics"]["privacy_epsilon"] > 0 for row in shown["rounds"])
