"""A backup that was made while the server worked is restored: docs/deploy.md, *Backup and restore*."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from .conftest import RUN_FILE, WAIT_S, Federation, Process, wait_for

ROUNDS = 4
SMALL = RUN_FILE.replace("depth = 8", "depth = 1")
SMALL = SMALL.replace("count = 2", f"count = {ROUNDS}")


def start_clients(federation: Federation) -> None:
    """Starts clients that stay when a run is over: those of a copy know more than the server does."""
    for name in ("alice", "bob"):
        where = ["--server", f"127.0.0.1:{federation.port}", "--name", name, "--threads", "1"]
        what = ["--data", str(federation.folder / name / "data.parquet")]
        federation._start("fedpeft_client", name, *where, *what, "--state-dir", str(federation.folder / name / "state"))


def stop(server: Process) -> None:
    server.process.terminate()
    assert server.process.wait(WAIT_S) == 0


def command(*arguments: str) -> str:
    """Runs a command of the server; returns what it said."""
    ended = subprocess.run(
        [sys.executable, "-m", "fedpeft_server", *arguments], capture_output=True, text=True, timeout=WAIT_S
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def committed(data: Path) -> int:
    """Reads the number of committed rounds out of the database of a daemon that does not run."""
    with closing(sqlite3.connect(data / "fedpeft.db")) as database:
        return int(database.execute("select count(*) from rounds where phase = 'committed'").fetchone()[0])


def completed(federation: Federation, run: str, out: Path) -> tuple[Any, dict[str, NDArray[np.float32]]]:
    wait_for(lambda: federation.show(run)["state"] == "completed", "the end of the run")
    federation.fedpeft("run", "export", run, "--format", "safetensors", "--out", str(out))
    return federation.show(run), load_file(out)


@pytest.mark.slow
def test_a_run_that_is_put_back_ends_with_the_same_bits(federation: Federation) -> None:
    federation.run_file.write_text(SMALL)
    data, copy = federation.folder / "server", federation.folder / "copy"
    server = federation.server()
    run = federation.create()
    start_clients(federation)
    wait_for(lambda: server.events("round committed"), "a committed round")

    command("backup", "--data-dir", str(data), "--to", str(copy))
    assert 1 <= committed(copy) < ROUNDS, "the copy is of a run under way"
    _, first = completed(federation, run, federation.folder / "first.safetensors")

    stop(server)
    shutil.rmtree(data)
    assert "0 faults, 0 notes" in command("restore", "--from", str(copy), "--data-dir", str(data))
    federation.server()
    whole, second = completed(federation, run, federation.folder / "second.safetensors")

    assert [row["version"] for row in whole["rounds"]] == list(range(1, ROUNDS + 1))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    federation.fedpeft("run", "verify", run)
