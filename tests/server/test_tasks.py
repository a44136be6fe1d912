"""Work that outlives its caller: what becomes of its failure."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Event

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import DiskFull, StateInvalid
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.store import store as store_module
from fedpeft_server.store.blobs.integrity import Integrity
from fedpeft_server.store.database import Database
from fedpeft_server.store.spool import Spool
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.store.store import Store
from fedpeft_server.timing import TIMING

from .conftest import Daemon, RawClient, StartDaemon, config, filled, refused

LEFT = "a step failed after its caller had disconnected"


@pytest.mark.parametrize(
    ("error", "level"), [(StateInvalid("the disk is gone"), "warning"), (ValueError("x"), "error")]
)
async def test_a_transaction_that_fails_after_its_caller_left_is_said_once(
    error: Exception, level: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    store, begun, go_on = Store(tmp_path / "data", "", "", keep_updates=False, timing=TIMING), asyncio.Event(), Event()
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
    said = [line for line in lines if line["event"] == LEFT]
    assert [line["log_level"] for line in said] == [level]
    assert unretrieved == []


def test_the_end_does_not_wait_for_a_store_that_gives_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(store_module, "END_S", 0.2)
    store, answered = Store(tmp_path / "data", "", "", keep_updates=False, timing=TIMING), Event()
    asking = store._folds.submit(answered.wait, 30)
    with capture_logs() as lines:
        store.close()
    assert [line["event"] for line in lines] == ["a store or the database gives no answer; it is not waited for"]
    assert not asking.done()
    answered.set()
    assert asking.result(10)


@pytest.mark.parametrize("waits", [True, False])
def test_a_process_ends_though_a_thread_waits(waits: bool) -> None:
    code = (
        "import threading, time; from fedpeft_server.tasks import leave_behind; print('said'); "
        f"threading.Thread(target=time.sleep, args=(300,), daemon={not waits}).start(); leave_behind(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3 if waits else 0, "said\n", "")


async def _register(daemon: Daemon, client: RawClient, run: str) -> object:
    return await daemon.client("b").register()


async def _list(daemon: Daemon, client: RawClient, run: str) -> object:
    return await daemon.operator.ListClients(op.ListClientsRequest())


async def _create(daemon: Daemon, client: RawClient, run: str) -> object:
    return await daemon.create(request_id="2")


async def _push(daemon: Daemon, client: RawClient, run: str) -> object:
    return await client.push((await client.task(run)).ticket, filled(1.0))


async def _resume(daemon: Daemon, client: RawClient, run: str) -> object:
    return await client.pull(run, 0, offset=8)


async def _download(daemon: Daemon, client: RawClient, run: str) -> object:
    return [part async for part in daemon.operator.DownloadAdapter(op.DownloadAdapterRequest(run=run))]


CallMade = Callable[[Daemon, RawClient, str], Awaitable[object]]
OUTLIVING: list[tuple[type, str, CallMade]] = [
    (Database, "see_clients", _register),
    (Database, "touch_clients", _list),
    (SpoolWriter, "finish", _create),
    (Spool, "writer", _push),
    (SpoolWriter, "write", _push),
    (Database, "count_at_least", _resume),
    (Integrity, "fault", _download),
]


@pytest.mark.timed(traffic_write_s=3600.0)
@pytest.mark.parametrize(("owner", "method", "make"), OUTLIVING, ids=[name for _, name, _ in OUTLIVING])
async def test_work_of_a_call_that_fails_after_its_client_left_is_said_once(
    owner: type, method: str, make: CallMade, start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start()
    run = (await daemon.create(config(rounds={"count": 1, "clients": 1}))).id
    (client,) = await daemon.clients("a")
    begun, go_on, loop = asyncio.Event(), Event(), asyncio.get_running_loop()

    def fails(*_: object, **__: object) -> None:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        raise StateInvalid("the disk is gone")

    with capture_logs() as lines:
        try:
            with monkeypatch.context() as patch:
                patch.setattr(owner, method, fails)
                if method == "see_clients":  # which the store holds already
                    patch.setattr(daemon.server.store.registrations, "_write", fails)
                call = asyncio.ensure_future(make(daemon, client, run))
                async with asyncio.timeout(10):
                    await begun.wait()
                    call.cancel()
                    while not any(line["event"] == "call" and line["code"] == "CANCELLED" for line in lines):
                        await asyncio.sleep(0.01)
        finally:
            go_on.set()
        async with asyncio.timeout(10):
            while not (said := [line for line in lines if line["event"] == LEFT]):
                await asyncio.sleep(0.01)
    assert [(line["log_level"], line["message"]) for line in said] == [("warning", "the disk is gone")]


@pytest.mark.timed(traffic_write_s=3600.0)
async def test_bytes_of_a_resumed_download_are_written_later_if_its_client_left_and_the_disk_failed(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start()
    run = (await daemon.create(config(rounds={"count": 1, "clients": 1}))).id
    (client,) = await daemon.clients("a")
    await client.task(run)

    def fails(*_: object) -> None:
        raise DiskFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.server.store.db, "count_at_least", fails)
        assert await refused(client.pull(run, 0, offset=8)) == "DISK_FULL"
    await daemon.server.byte_counter.write(daemon.server.store)
    (current,) = await daemon.rounds(run)
    assert current.payload_bytes_down == 8
