"""A tiny site (data), a tiny run (one block of a ViT at 32 pixels), the server, and the client as a process."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft.config import parse_config
from fedpeft.models import backbones
from fedpeft.peft import tune
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.channel import Channel

from ..conftest import process_itself
from .federation import FakeRun, Federation
from .transfer_site import Site, a_run

CLASSES = ("cat", "dog", "emu")
START_S = 90.0
"""Longest wait for anything in a test; the machine may be busy."""
TIMED = Path(__file__).with_name("timed_client.py")


def write_images(path: Path, count: int = 12, classes: tuple[str, ...] = CLASSES) -> Path:
    """Writes a parquet file of random images with string labels."""
    generator = np.random.default_rng(0)
    images, labels = [], []
    for k in range(count):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{k}.png"})
        labels.append(classes[k % len(classes)])
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def tiny_run(method: str = "bias", **sections: dict[str, Any]) -> FakeRun:
    """Builds a run of one round and one client; `sections` add to the run file."""
    data = {
        "model": {
            "name": "vit_tiny_patch16_224",
            "weights": "none",
            "image_size": 32,
            "depth": 1,
            "classes": CLASSES,
        },
        "peft": {"method": method},
        "rounds": {"count": 1, "clients": 1, "seed": 7, **sections.pop("rounds", {})},
        "training": {"steps": 3, "batch_size": 4, "learning_rate": 0.1, **sections.pop("training", {})},
        **sections,
    }
    config = parse_config(data)
    backbone = backbones.build(config.model, config.rounds.seed)
    tuned = tune(backbone, method, config.peft.options, config.rounds.seed)
    return FakeRun(config, tuned.spec, backbones.fingerprint(backbone, tuned.spec), tuned.state())


class ClientProcess:
    """`fedpeft-client` as people start it, with its log lines read as they come."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self.text: list[str] = []
        self.out = b""
        self._readers = [asyncio.create_task(self._read_log()), asyncio.create_task(self._read_out())]

    async def _read_log(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.text.append(line.decode())
            if line.startswith(b"{"):
                self.lines.append(json.loads(line))

    async def _read_out(self) -> None:
        assert self.process.stdout is not None
        self.out = await self.process.stdout.read()

    async def said(self, event: str) -> dict[str, Any]:
        """Waits for a log line that begins with `event`."""
        await until(lambda: self.events(event) or self.process.returncode is not None, self.text)
        assert self.events(event), "".join(self.text)
        return self.events(event)[0]

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"].startswith(event)]

    async def ended(self) -> int:
        """Waits for the end and returns the exit code."""
        await until(lambda: self.process.returncode is not None, self.text)
        await asyncio.gather(*self._readers)
        return await self.process.wait()

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return await self.ended()

    @property
    def pid(self) -> int:
        """The process id of the agent."""
        return process_itself(self.process.pid)

    def workers(self) -> list[int]:
        """Returns the process ids of the agent's children."""
        pid = self.pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def worker(self) -> int:
        """Returns the process id of the worker."""
        (pid,) = self.workers()
        return pid


async def until(condition: Callable[[], Any], text: list[str] | None = None) -> None:
    """Waits until a condition holds."""
    try:
        async with asyncio.timeout(START_S):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError("waited in vain; the client said:\n" + "".join(text or [])) from None


def alive(pid: int) -> bool:
    """Returns whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


StartClient = Callable[..., Awaitable[ClientProcess]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images.parquet")


@pytest.fixture
async def federation() -> AsyncIterator[Federation]:
    """A server without a run; tests set `federation.run`."""
    server = Federation(None)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
async def start_client(federation: Federation, data: Path, tmp_path: Path) -> AsyncIterator[StartClient]:
    """Starts clients, with the durations of `timing` if given; those still there at the end of the test are killed."""
    clients: list[ClientProcess] = []

    async def start(
        *flags: str, name: str = "site-a", state: Path | None = None, timing: dict[str, float] | None = None
    ) -> ClientProcess:
        program = ["-m", "fedpeft_client"] if timing is None else ["-P", str(TIMED), json.dumps(timing)]
        command = [sys.executable, *program, "--server", federation.address]
        command += ["--name", name, "--data", str(data), "--device", "cpu", "--threads", "1"]
        command += ["--state-dir", str(state or tmp_path / name), "--log-format", "json", *flags]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        clients.append(ClientProcess(process))
        return clients[-1]

    yield start
    for client in clients:
        if client.process.returncode is None:
            await client.kill()


@pytest.fixture
async def site(federation: Federation, tmp_path: Path) -> AsyncIterator[Site]:
    federation.run = a_run()
    with StateDirectory(tmp_path / "state") as directory:
        async with Channel(federation.address, "site-a", directory.instance) as channel:
            yield Site(federation, directory, channel)
