"""Background work is supervised: a failure that no call would see is in health, log and metric, or ends the daemon."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from fedpeft.errors import DiskFull, Internal
from fedpeft.rounds.events import Event, TimePassed
from fedpeft.v1 import run_pb2
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs.actor import RunActor
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.store.rows import Transition

from ..ports import free_port
from .conftest import Daemon, config, filled

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def ended() -> list[bool]:
    return []


@pytest.fixture
async def background(ended: list[bool]) -> Background:
    return Background(Metrics(), lambda: ended.append(True))


def failures(metrics: Metrics, work: str) -> float:
    return float(metrics.background_failures.labels(work)._value.get())


@pytest.mark.parametrize("fault", [DiskFull("no room"), RuntimeError("a fault that nobody foresaw")])
async def test_a_step_that_fails_is_said_and_taken_again(fault: Exception, background: Background) -> None:
    taken, healths, third = 0, [], asyncio.Event()

    async def step() -> None:
        nonlocal taken
        healths.append(background.healthy)
        taken += 1
        if taken == 1:
            raise fault
        if taken == 3:
            third.set()

    with capture_logs() as said:
        background.every("storage", 0.01, step)
        await asyncio.wait_for(third.wait(), 5)
        await background.close()
    assert said[0]["log_level"] == "error"
    assert said[0]["work"] == "storage"
    assert failures(background._metrics, "storage") == 1
    assert healths[:3] == [True, isinstance(fault, DiskFull), True]
    assert background.fault is None


@pytest.mark.parametrize("kept", [True, False])
async def test_work_that_ends_in_a_failure_ends_the_daemon(
    kept: bool, background: Background, ended: list[bool]
) -> None:
    async def work() -> None:
        raise RuntimeError("unforeseen")

    with capture_logs() as said:
        (background.supervise if kept else background.begin)("matching", work())
        await asyncio.sleep(0.01)
    assert isinstance(background.fault, Internal) and "'matching' failed: RuntimeError: unforeseen" in str(
        background.fault
    )
    assert ended and not background.healthy
    assert said[-1]["log_level"] == "critical"
    assert failures(background._metrics, "matching") == 1


async def test_only_what_must_last_may_not_end(background: Background, ended: list[bool]) -> None:
    async def work() -> None:
        await asyncio.sleep(0)

    background.begin("fold", work())
    await asyncio.sleep(0.01)
    assert not ended
    with capture_logs():
        background.supervise("matching", work())
        await asyncio.sleep(0.01)
    assert ended


async def status(daemon: Daemon) -> int:
    answer = await health_pb2_grpc.HealthStub(daemon.channel).Check(health_pb2.HealthCheckRequest())
    return int(answer.status)


async def until_status(daemon: Daemon, wanted: int) -> None:
    async with asyncio.timeout(10):
        while await status(daemon) != wanted:
            await asyncio.sleep(0.02)


@pytest.mark.timed(matching_check_s=0.2)
@pytest.mark.parametrize("after_s", [0.0, 0.4], ids=["at once", "after others were let pass"])
async def test_a_run_whose_rounds_cannot_be_opened_shows_in_health_and_hinders_no_other(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    bad = await daemon.create(config(rounds={"count": 1, "clients": 1}), request_id="bad")
    offer = RunEngine.offer

    async def faulty(self: RunEngine, *given: Any, **named: Any) -> None:
        if self.run.id == bad.id:
            await asyncio.sleep(after_s)
            raise RuntimeError("unforeseen")
        await offer(self, *given, **named)

    await until_status(daemon, SERVING)
    monkeypatch.setattr(RunEngine, "offer", faulty)
    await until_status(daemon, NOT_SERVING)
    good = await daemon.create(config(rounds={"count": 1, "clients": 1}), request_id="good")
    (a,) = await daemon.clients("a")
    task = await a.task(good.id)
    await a.push(task.ticket, filled(1.0))
    await daemon.until(good.id, lambda r: r.version == 1)
    assert failures(daemon.server.metrics, "matching") >= 1
    monkeypatch.setattr(RunEngine, "offer", offer)
    await until_status(daemon, SERVING)


@pytest.mark.timed(deadline_retry_s=0.05)
async def test_a_deadline_that_fails_shows_in_health_until_it_was_acted_on(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = RunActor.advance
    failing = True

    async def faulty(self: RunActor, event: Event, *rest: str, **named: str) -> Transition | None:
        if failing and isinstance(event, TimePassed):
            raise RuntimeError("unforeseen")
        return await advance(self, event, *rest, **named)

    monkeypatch.setattr(RunActor, "advance", faulty)
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "deadline_s": 1, "max_extensions": 0}))
    (a,) = await daemon.clients("a")
    await a.task()
    await until_status(daemon, NOT_SERVING)
    failing = False
    await until_status(daemon, SERVING)
    paused = await daemon.until(run.id, lambda r: "still awaited: a" in r.reason)
    assert paused.state == run_pb2.RUN_STATE_PAUSED and failures(daemon.server.metrics, "deadline") >= 1


def test_a_daemon_whose_matching_fails_ends_with_1(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from fedpeft_server.runs.matching import Matching\n"
        "async def match(self): raise RuntimeError('unforeseen')\n"
        "Matching._match = match\n"
        "from fedpeft_server.__main__ import main\n"
        "main()\n"
    )
    flags = ["--data-dir", str(tmp_path), "--listen", f"127.0.0.1:{free_port()}", "--metrics", "", "--drain-s", "0"]
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "fedpeft-server: background work 'matching' failed: RuntimeError: unforeseen; the log has the details"
    )


async def test_the_end_waits_for_what_is_begun_meanwhile(background: Background) -> None:
    done = list[str]()

    async def last() -> None:
        await asyncio.sleep(0.05)
        done.append("last")

    async def first() -> None:
        await asyncio.sleep(0.05)
        background.begin("files", last())

    background.begin("fold", first())
    async with asyncio.timeout(5):
        await background.close()
    assert done == ["last"]
