"""A real federation of processes: daemon, agents, the operator's command; and a slow network between them."""

from __future__ import annotations

import io
import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from ..ports import free_port

WAIT_S = 150.0
"""Longest wait for anything; the machine may be busy."""

RUN_FILE = """
name = "survival"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 8
classes = ["cat", "dog"]
[peft]
method = "full"
[rounds]
count = 2
clients = 2
quorum = 2
deadline_s = 300
seed = 5
[training]
steps = 20
batch_size = 4
learning_rate = 0.01
"""


def write_site(path: Path, seed: int, count: int = 16) -> Path:
    """Writes a parquet file of random images."""
    generator = np.random.default_rng(seed)
    images = []
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": [("cat", "dog")[n % 2] for n in range(count)]}), path)
    return path


def wait_for(reached: Callable[[], Any], what: str, pause_s: float = 0.05, most_s: float = WAIT_S) -> Any:
    """Waits until `reached` returns something true, and returns it."""
    until = time.monotonic() + most_s
    while time.monotonic() < until:
        found = reached()
        if found:
            return found
        time.sleep(pause_s)
    raise AssertionError(f"waited {most_s:.0f} s for {what}")


class Process:
    """A process that is started by name of its module and whose JSON log lines can be read."""

    def __init__(self, module: str, log: Path, *flags: str) -> None:
        self.log = log
        self._file = log.open("ab")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, *flags, "--log-format", "json"]
        self.process = subprocess.Popen(command, stdout=self._file, stderr=self._file, env=environment)
        self._skip = log.stat().st_size

    def lines(self) -> list[dict[str, Any]]:
        """Returns what this process has logged so far."""
        text = self.log.read_bytes()[self._skip :].decode()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("event") == name]

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nothing is closed."""
        self.process.kill()
        self.process.wait()
        self._file.close()


class SlowLink:
    """A TCP proxy to the daemon that lets few bytes a second through on their way up, until it is told to hurry."""

    def __init__(self, target: int, bytes_per_s: int) -> None:
        self.port = free_port()
        self.hurry = threading.Event()
        self._target = target
        self._bytes_per_s = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                if self._listener.fileno() < 0:
                    return
                near.close()
                continue
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        def wait(data: bytes) -> None:
            if slow and not self.hurry.is_set():
                time.sleep(len(data) / self._bytes_per_s)

        pump(source, sink, seen=wait)


def pump(source: socket.socket, sink: socket.socket, seen: Callable[[bytes], None]) -> None:
    """Hands on what comes, once `seen` was called with it, until one side ends or is killed; then both are closed."""
    try:
        while data := source.recv(65_536):
            seen(data)
            sink.sendall(data)
    except OSError:
        pass  # one side was killed, which is what these tests do
    finally:
        for each in (source, sink):
            with suppress(OSError):  # it is closed already
                each.shutdown(socket.SHUT_RDWR)  # which wakes the thread of the other direction; a mere close does not
            each.close()


class Federation:
    """One daemon, two clients, one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.started: list[Process] = []
        self.clients: list[Process] = []
        for seed, name in enumerate(("alice", "bob")):
            write_site(folder / name / "data.parquet", seed)
        self.run_file = folder / "run.toml"
        self.run_file.write_text(RUN_FILE)

    def server(self, flags: tuple[str, ...] = ()) -> Process:
        where = ["--data-dir", str(self.folder / "server"), "--listen", f"127.0.0.1:{self.port}", "--metrics", ""]
        process = self._start("fedpeft_server", "server", *where, *flags)
        wait_for(lambda: process.events("serving") or process.process.poll() is not None, "the daemon")
        assert process.process.poll() is None, process.log.read_text()
        return process

    def client(self, name: str, port: int = 0, flags: tuple[str, ...] = ()) -> Process:
        where = ["--server", f"127.0.0.1:{port or self.port}", "--name", name]
        what = ["--data", str(self.folder / name / "data.parquet"), "--state-dir", str(self.folder / name / "state")]
        process = self._start("fedpeft_client", name, *where, *what, "--threads", "1", "--once", *flags)
        self.clients.append(process)
        return process

    def kill(self, client: Process) -> None:
        """Kills a client for good; `finish` waits for it no more."""
        client.kill()
        self.clients.remove(client)

    def _start(self, module: str, name: str, *flags: str) -> Process:
        process = Process(module, self.folder / f"{name}.log", *flags)
        self.started.append(process)
        return process

    def fedpeft(self, *arguments: str) -> Any:
        command = [
            sys.executable,
            "-m",
            "fedpeft_operator.app",
            "--server",
            f"127.0.0.1:{self.port}",
            *arguments,
            "--json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.strip() else None

    def create(self) -> str:
        return str(self.fedpeft("run", "create", str(self.run_file))["run"])

    def show(self, run: str) -> Any:
        return self.fedpeft("run", "show", run)

    def phase(self) -> str:
        """Reads the phase of the newest round out of the database of a daemon that was killed."""
        with sqlite3.connect(self.folder / "server" / "fedpeft.db") as database:
            return str(database.execute("select phase from rounds order by number desc limit 1").fetchone()[0])

    def partial_upload(self, least: int, ticket: str = "ticket-*") -> Path | None:
        """Returns an upload that is under way, at least so many bytes of it."""
        for part in (self.folder / "server" / "spool").glob(f"{ticket}.*.part"):
            if part.stat().st_size >= least:
                return part
        return None

    def finish(self, run: str) -> dict[str, NDArray[np.float32]]:
        """Waits until all clients have ended by themselves; returns the last version's tensors."""
        for client in self.clients:
            assert client.process.wait(WAIT_S) == 0, client.log.read_text()[-3000:]
        assert self.show(run)["state"] == "completed"
        out = self.folder / "adapter.safetensors"
        self.fedpeft("run", "export", run, "--format", "safetensors", "--out", str(out))
        return load_file(out)

    def close(self) -> None:
        for process in self.started:
            process.kill()


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, NDArray[np.float32]]]:
    """The last version of a federation in which nothing goes wrong."""
    made = Federation(tmp_path_factory.mktemp("undisturbed"))
    try:
        made.server()
        made.client("alice")
        made.client("bob")
        yield made.finish(made.create())
    finally:
        made.close()
