"""Every query of every panel and rule finds something in a Prometheus that scraped a real run, and two alerts fire."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fedpeft.adapters import payload
from fedpeft.v1 import federation_service_pb2 as fed

from ..ports import free_port
from ..server.conftest import (  # noqa: F401 (start is a fixture)
    SPEC,
    Daemon,
    RawClient,
    StartDaemon,
    config,
    filled,
    header,
    start,
)
from .conftest import alerts, queries, rules
from .prometheus import Prometheus, scraping

SELECTOR = re.compile(r"\b(?:\w+:)?(?:fedpeft|up)[\w:]*(?:\{[^}]*\})?")
VARIABLES = {"$instance": ".+", "$run": ".+", "$__rate_interval": "5s"}
DEADLINE_S = 6.0


def plain(expr: str) -> str:
    """Returns a panel's query as Grafana sends it when all daemons and runs are chosen."""
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    assert "$" not in expr, expr
    return expr


PRIVATE = "fedpeft_privacy_epsilon"
"""Only a run with noise has it, which this one is not: tests/server/runs/test_private_rounds.py sees its values."""


def asked() -> dict[str, str]:
    """Returns every query, by where it stands; of alerts, which find nothing when all is well, what they look at."""
    found = {f"{where} {number}": plain(expr) for number, (where, expr) in enumerate(queries())}
    for rule in rules():
        if not rule.alert:
            found[rule.name] = rule.expr
    for alert in alerts():
        for selector in SELECTOR.findall(alert.expr):
            found[f"{alert.name}: {selector}"] = selector
    return {where: expr for where, expr in found.items() if PRIVATE not in expr}


async def until(reached: Callable[[], Awaitable[bool]], seconds: float) -> None:
    """Waits for something; what is missing is found out by the assertions that follow."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not await reached():
        await asyncio.sleep(0.1)


@asynccontextmanager
async def observed(start: StartDaemon, folder: Path) -> AsyncIterator[tuple[Daemon, Prometheus]]:  # noqa: F811
    port = free_port()
    daemon = await start(metrics=f"127.0.0.1:{port}")
    # In plain text the daemon has no certificates; where it has, it shows them by these calls.
    daemon.server.metrics.certificate_expires("server", time.time() + 90 * 86_400)
    daemon.server.metrics.certificate_expires("authority", time.time() + 3650 * 86_400)
    there = scraping(f"127.0.0.1:{port}", folder)
    prometheus = await asyncio.to_thread(there.__enter__)
    try:
        yield daemon, prometheus
    finally:
        there.__exit__(None, None, None)


async def contribute(client: RawClient, run: str, rate: float) -> None:
    """Does what a client does in a round; one without speed leaves when it has its ticket."""
    task = await client.task(run)
    if not rate:
        return
    await client.pull(run, task.version)
    manifest, data = payload.encode(filled(0.1), SPEC.sent(1), "float32")
    figures = {"loss": 1.0, "images_per_second": rate, "gpu_memory_bytes": 2.0**31}
    await client.push_raw(header(task.ticket, manifest, 10, **figures), [(0, data)])


async def score(judge: RawClient, run: str, version: int, accuracy: float) -> None:
    metrics = {"accuracy": accuracy, "loss": 1.0 - accuracy}
    request = fed.PushEvaluationRequest(run=run, version=version, split="test", metrics=metrics)
    await judge.stub.PushEvaluation(request, metadata=judge.metadata)


async def hold(daemon: Daemon, prometheus: Prometheus) -> str:
    """Holds two rounds of two clients, and a third that one of them leaves."""

    async def scraped() -> bool:
        return await asyncio.to_thread(prometheus.series, "fedpeft_round_seconds_count == 0") > 0

    rounds = {"count": 3, "clients": 2, "quorum": 2, "deadline_s": DEADLINE_S, "max_extensions": 9}
    run = (await daemon.create(config(name="observed", rounds=rounds))).id
    await until(scraped, 10)
    a, b = await daemon.clients("a", "b")
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    await score(judge, run, 0, 0.25)
    for number in (1, 2):
        await asyncio.gather(contribute(a, run, 100.0), contribute(b, run, 50.0))
        await daemon.until(run, lambda r, n=number: r.version == n)  # type: ignore[misc]
        await score(judge, run, number, 0.5)
    await asyncio.gather(contribute(a, run, 100.0), contribute(b, run, 0.0))
    return run


async def test_every_query_finds_something_in_a_real_run(start: StartDaemon, tmp_path: Path) -> None:  # noqa: F811
    async with asyncio.timeout(100), observed(start, tmp_path / "prometheus") as (daemon, prometheus):
        await hold(daemon, prometheus)
        found: dict[str, int] = {}

        async def all_found() -> bool:
            for where, expr in asked().items():
                if not found.get(where):
                    found[where] = await asyncio.to_thread(prometheus.series, expr)
            return all(found.values())

        await until(all_found, 15)
        print(*(f"{count:3}  {where}" for where, count in found.items()), sep="\n")
        assert len(found) >= 100
        assert [(where, asked()[where]) for where, count in found.items() if not count] == []

        fired = {"FedpeftStragglers": 0, "FedpeftNoQuorum": 0}  # b never sends its update

        async def all_fired() -> bool:
            for name in fired:
                expr = f'count_over_time(ALERTS{{alertname="{name}", alertstate="firing"}}[1m])'
                fired[name] = await asyncio.to_thread(prometheus.series, expr)
            return all(fired.values())

        await until(all_fired, 2 * DEADLINE_S)
        assert fired == {"FedpeftStragglers": 1, "FedpeftNoQuorum": 1}
        state = await asyncio.to_thread(prometheus.get, "rules")
        ill = [(r["name"], r.get("lastError")) for g in state["groups"] for r in g["rules"] if r["health"] != "ok"]
        assert ill == []
        active = await asyncio.to_thread(prometheus.get, "alerts")
        assert {a["labels"]["alertname"] for a in active["alerts"] if a["state"] == "firing"} <= set(fired)
