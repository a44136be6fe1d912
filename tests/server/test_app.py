"""The life of a daemon in its process: a start that fails and an end that fails leave nothing open."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError, SettingsInvalid, StateInvalid
from fedpeft_server import app
from fedpeft_server.runs.runs import Runs
from fedpeft_server.settings import Settings
from fedpeft_server.store.store import Store
from fedpeft_server.timing import TIMING
from fedpeft_server.traffic import ByteCounter

from ..ports import free_port
from .conftest import begin_life
from .secured import federation

THREADS = ("database", "compute", "fold", "files", "versions", "reading", "metrics")


def settings(folder: Path, **changes: object) -> Settings:
    values: dict[str, object] = {"data_dir": folder, "listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", "drain_s": 0.0}
    return Settings.model_validate({**values, **changes})


async def opened() -> list[str]:
    """Returns files and listening sockets of this process that a daemon would have, and its threads."""
    gc.collect()
    await asyncio.sleep(0.05)  # gRPC frees a server that nothing refers to any more in the turns that follow
    found = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # that of the listing itself
        found.append("listening socket" if target.startswith("socket:") and _listens(int(number)) else target)
    return sorted(name for name in found if "/" in name or name.startswith(("listening", *THREADS)))


def _listens(number: int) -> bool:
    with socket.socket(fileno=os.dup(number)) as found:
        return found.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX) and bool(
            found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        )


async def fails(given: Settings) -> FedpeftError:
    """Returns the error of a start; nothing refers to what its frames held any more."""
    with pytest.raises(FedpeftError) as caught:
        await app.run(given, TIMING)
    error = caught.value
    del caught
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


async def lost(*_: object) -> None:
    raise StateInvalid("the disk is gone")


@pytest.mark.parametrize("flag", ["listen", "metrics"])
async def test_a_start_that_finds_its_port_taken_leaves_nothing_open(tmp_path: Path, flag: str) -> None:
    _, end = await begin_life(settings(tmp_path))  # what gRPC and others open once in a process
    await end()
    before = await opened()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = await fails(settings(tmp_path, **{flag: f"127.0.0.1:{taken.getsockname()[1]}"}))
    assert isinstance(error, SettingsInvalid) and f"--{flag}" in error.message
    assert await opened() == before


async def test_a_start_that_finds_the_port_for_enrolment_taken_leaves_nothing_open(tmp_path: Path) -> None:
    async with federation(tmp_path):
        pass
    before = await opened()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = await fails(settings(tmp_path / "data", enroll=f"127.0.0.1:{taken.getsockname()[1]}"))
    assert isinstance(error, SettingsInvalid) and "--enroll" in error.message
    assert await opened() == before


@pytest.mark.parametrize("step", ["fedpeft_server.app.tell_lost_versions", "fedpeft_server.runs.runs.Runs.start"])
async def test_a_start_that_fails_once_the_ports_are_bound_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with federation(tmp_path):
        pass
    before, port = await opened(), free_port()
    with monkeypatch.context() as patched:
        patched.setattr(step, lost)
        error = await fails(settings(tmp_path / "data", enroll="127.0.0.1:0", listen=f"127.0.0.1:{port}"))
    assert error.message == "the disk is gone"
    assert await opened() == before
    with socket.create_server(("127.0.0.1", port)):  # as the next server does
        pass


async def test_a_step_of_the_end_that_fails_skips_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, end = await begin_life(settings(tmp_path))
    await end()
    before = await opened()
    done: list[str] = []

    def noted(owner: type, name: str) -> None:
        step = getattr(owner, name)

        async def closed(self: object, *arguments: object) -> None:
            await step(self, *arguments)
            done.append(name)
            raise StateInvalid(f"{name} failed")

        monkeypatch.setattr(owner, name, closed)

    noted(Runs, "close")
    noted(ByteCounter, "write")
    close = Store.close

    def close_store(self: Store) -> None:
        close(self)
        done.append("store")

    monkeypatch.setattr(Store, "close", close_store)
    _, end = await begin_life(settings(tmp_path))
    done.clear()
    with pytest.raises(StateInvalid, match="close failed"):
        await end()
    assert done == ["close", "write", "store"]
    assert await opened() == before
