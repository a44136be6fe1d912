"""SQLite locked by another program: what reads goes on, what writes waits, and is then refused in words."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from fedpeft.errors import DatabaseLocked
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server import app
from fedpeft_server.runs import aggregation
from fedpeft_server.settings import Settings
from fedpeft_server.timing import TIMING

from ...ports import free_port
from ..conftest import StartDaemon, config, fault, filled

HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN " + sys.argv[2])
print("locked", flush=True)
sys.stdin.read()
"""
MODES = ["IMMEDIATE", "EXCLUSIVE"]


@contextmanager
def locked(folder: Path, mode: str) -> Iterator[None]:
    """Holds a lock on the database of a data folder, in another process."""
    command = [sys.executable, "-c", HOLD, str(folder / "fedpeft.db"), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield


IMPATIENT = replace(TIMING, database_busy_s=0.3)
impatient = pytest.mark.timed(database_busy_s=0.3)


@pytest.mark.timed(database_busy_s=0.3, traffic_write_s=0.1)
@pytest.mark.parametrize("mode", MODES)
async def test_reading_goes_on_and_writing_is_refused_until_the_lock_is_gone(start: StartDaemon, mode: str) -> None:
    daemon = await start()
    folder = daemon.server.settings.data_dir
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    with capture_logs() as said, locked(folder, mode):
        assert (await daemon.run(run.id)).id == run.id
        assert [r.number for r in await daemon.rounds(run.id)] == [1]
        assert (await a.task()).ticket == task.ticket
        _, data = await a.pull(run.id, 0)
        assert data
        for call in (daemon.client("b").register(), a.push(task.ticket, filled(1.0))):
            assert (await fault(call)).message == DatabaseLocked.for_sites
        error = await fault(daemon.create(request_id="2"))
        assert isinstance(error, DatabaseLocked), error
        assert f"{folder}/fedpeft.db has been locked by another program" in error.message
        answer = await health_pb2_grpc.HealthStub(daemon.channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        async with asyncio.timeout(10):
            while not any(line.get("work") == "traffic" for line in said):
                await asyncio.sleep(0.02)
    assert not any("exc_info" in line for line in said)
    await a.push(task.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    (done,) = await daemon.rounds(run.id)
    assert done.wire_bytes_down >= done.payload_bytes_down == len(data), "what could not be written was written later"


@pytest.mark.timed(database_busy_s=0.3, fold_retry_s=0.05)
async def test_a_fold_that_is_put_off_says_why(start: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon, fold = await start(), aggregation.aggregate
    run = (await daemon.create(config(rounds={"count": 1, "clients": 1}))).id
    (a,) = await daemon.clients("a")
    task = await a.task()
    with ExitStack() as held:
        lock = locked(daemon.server.settings.data_dir, "IMMEDIATE")

        def then_locked(*facts: Any) -> Any:
            result = fold(*facts)
            monkeypatch.undo()
            held.enter_context(lock)
            return result

        monkeypatch.setattr(aggregation, "aggregate", then_locked)
        await a.push(task.ticket, filled(1.0))
        async with asyncio.timeout(10):
            while "cannot yet" not in (reason := (await daemon.run(run)).reason):
                await asyncio.sleep(0.02)
        told_sites = daemon.server.runs.why(daemon.server.runs.get(run))
    put_off = f"round 1 of {run} is being folded; this server cannot yet, and tries again"
    database = f"database sqlite:///{daemon.server.settings.data_dir}/fedpeft.db has been locked by another program"
    assert reason.startswith(f"{put_off}: {database}"), reason
    assert told_sites == put_off
    await daemon.until(run, lambda r: r.version == 1)


@pytest.mark.timed(database_busy_s=0.3, fold_retry_s=0.05)
async def test_a_fold_that_is_put_off_holds_up_no_end(start: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object) -> None:
        tried.set()
        raise DatabaseLocked("another program has it")

    tried = asyncio.Event()
    monkeypatch.setattr(aggregation.Folding, "_fold_round", refused)
    daemon = await start()
    await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    await a.push((await a.task()).ticket, filled(1.0))
    async with asyncio.timeout(10):
        await tried.wait()
        await daemon.end()
    assert daemon.server.background.fault is None


async def test_a_call_waits_for_a_lock_that_goes(start: StartDaemon) -> None:
    daemon = await start()
    with locked(daemon.server.settings.data_dir, "IMMEDIATE"):
        registering = asyncio.ensure_future(daemon.client("a").register())
        assert not (await daemon.operator.ListRuns(op.ListRunsRequest())).runs
        await asyncio.sleep(0.2)
        assert not registering.done()
    await registering


@pytest.mark.parametrize("mode", MODES)
@impatient
async def test_a_start_is_refused_in_words(start: StartDaemon, mode: str) -> None:
    daemon = await start()
    folder = daemon.server.settings.data_dir
    await daemon.end()
    settings = Settings.model_validate({"data_dir": folder, "listen": f"127.0.0.1:{free_port()}", "metrics": ""})
    with locked(folder, mode), pytest.raises(DatabaseLocked, match="end its transaction"):
        await app.run(settings, IMPATIENT)
    await start(folder)


@impatient
async def test_the_status_is_unavailable(start: StartDaemon) -> None:
    daemon = await start()
    with locked(daemon.server.settings.data_dir, "IMMEDIATE"), pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.client("a").register()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert from_rpc_error(caught.value).reason == "DATABASE_LOCKED"
