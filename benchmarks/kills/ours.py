"""FedPEFT: one daemon, which is both network-facing and holds the rounds, and three clients that train a tiny model."""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from outcome import AWAY_S, CLIENTS, ROUNDS, Outcome, last_round
from PIL import Image
from processes import Processes, wait_for
from safetensors.numpy import load_file

RUN_FILE = f"""
name = "kills"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 1
classes = ["cat", "dog"]
[peft]
method = "bias"
[rounds]
count = {ROUNDS}
clients = {CLIENTS}
quorum = {CLIENTS}
seed = 5
[training]
steps = 60
batch_size = 8
"""


class FedPeft:
    """A federation that holds one run.

    Args:
        processes: Its processes.
        port: Port of the daemon.
    """

    def __init__(self, processes: Processes, port: int) -> None:
        self._processes = processes
        self._address = f"127.0.0.1:{port}"
        folder = processes.folder
        (folder / "run.toml").write_text(RUN_FILE)
        server = ["--data-dir", "data", "--listen", self._address, "--metrics", "", "--log-format", "json"]
        processes.start("server", sys.executable, "-m", "fedpeft_server", *server)
        wait_for(lambda: '"serving"' in processes.log("server"), "the daemon")
        (self._run,) = set(re.findall(r"run-[0-9a-z]{12}", self._fedpeft("run", "create", "run.toml")))
        for site in range(1, CLIENTS + 1):
            _write_images(folder / f"images{site}.parquet", site)
            client = ["--server", self._address, "--name", f"site{site}", "--data", f"images{site}.parquet"]
            processes.start(
                f"site{site}", sys.executable, "-m", "fedpeft_client", *client, "--state-dir", f"state{site}"
            )

    def _fedpeft(self, *arguments: str) -> str:
        program = str(Path(sys.executable).parent / "fedpeft")
        return self._processes.said(program, "--server", self._address, *arguments)

    def shown(self) -> dict[str, Any]:
        """Returns the run as `fedpeft run show` says it; empty while the daemon is away."""
        said = self._fedpeft("run", "show", self._run, "--json")
        return json.loads(said) if said.startswith("{") else {}

    def ended(self) -> int:
        """Returns the number of committed rounds."""
        return len(self.shown().get("rounds", ()))

    def adapter_sha256(self) -> str:
        """Returns the digest of the tensors of the newest version."""
        out = self._processes.folder / "adapter.safetensors"
        self._fedpeft("run", "export", self._run, "--format", "safetensors", "--out", str(out))
        tensors = load_file(out)
        return hashlib.sha256(b"".join(tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


def _write_images(path: Path, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    rows = []
    for number in range(16):
        buffer = io.BytesIO()
        Image.fromarray(drawn.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{number}.png"})
    pq.write_table(pa.table({"image": rows, "label": [("cat", "dog")[n % 2] for n in range(len(rows))]}), path)


@contextmanager
def federation(folder: Path, port: int) -> Iterator[tuple[FedPeft, Processes]]:
    """Gives a federation that is at work, and its processes, which end with the block."""
    processes = Processes(folder, {"OMP_NUM_THREADS": "1"})
    try:
        yield FedPeft(processes, port), processes
    finally:
        processes.close()


def tensors(folder: Path, port: int) -> str:
    """Returns the digest of a run's end in which nothing is killed."""
    with federation(folder, port) as (ours, _):
        last_round(ours.ended, lambda: False, time.monotonic())
        return ours.adapter_sha256()


def measure(folder: Path, port: int, victim: str, undisturbed: str) -> Outcome:
    """Kills a process after two rounds, starts it again as a service manager would, and tells what came of it."""
    with federation(folder, port) as (ours, processes):
        wait_for(lambda: ours.ended() >= 2, "two rounds")
        time.sleep(1)
        killed_at = time.monotonic()
        processes.kill(victim)
        time.sleep(AWAY_S)
        processes.start(victim)
        pause_s = last_round(ours.ended, lambda: False, killed_at)
        shown = wait_for(ours.shown, "the run")
        updates = sum(len(row["clients"]) for row in shown["rounds"])
        right = ours.adapter_sha256() == undisturbed
        return Outcome(len(shown["rounds"]), updates, shown["state"], right, pause_s)
