"""Files that the commands write are whole or not there, in whatever way the command ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CLIENTS = 3000


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A row for each of many clients, so that writing them takes a while."""
    path = tmp_path / "in" / "rows.parquet"
    path.parent.mkdir()
    images = [{"bytes": b"", "path": None}] * CLIENTS
    pq.write_table(pa.table({"image": images, "label": [k % 2 for k in range(CLIENTS)]}), path)
    return path


def partitioning(rows: Path, out: Path) -> subprocess.Popen[str]:
    """Starts a partition and returns once its first client is written, and what another left is gone."""
    before = set(os.listdir(out.parent))
    arguments = ["partition", str(rows), "--clients", str(CLIENTS), "--out", str(out)]
    process = subprocess.Popen(  # the signals are ignored where the tests run in the background or under nohup
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
         "signal.signal(signal.SIGHUP, signal.SIG_DFL); from fedpeft_operator.app import main; main()", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    while True:
        assert process.poll() is None, process.communicate()[1]
        there = set(os.listdir(out.parent))
        if not there & before and any((out.parent / name / "whole" / "client-0000").is_dir() for name in there):
            return process
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("ending", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 129)]
)
def test_an_interrupted_partition_leaves_nothing(rows: Path, tmp_path: Path, ending: signal.Signals, code: int) -> None:
    (tmp_path / "here").mkdir()
    process = partitioning(rows, tmp_path / "here" / "sites")
    process.send_signal(ending)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, os.listdir(tmp_path / "here")) == (code, []), said


def test_a_killed_partition_is_no_data_and_goes_with_the_next_one(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    process = partitioning(rows, tmp_path / "here" / "sites")
    process.kill()
    process.communicate(timeout=60)
    (left,) = os.listdir(tmp_path / "here")
    assert left.startswith(".sites.") and left.endswith(".new")
    process = partitioning(rows, tmp_path / "here" / "sites")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert os.listdir(tmp_path / "here") == []
