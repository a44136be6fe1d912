"""A program of benchmarks/ that is ended leaves no daemon and no folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAM = """
import time
from workload import daemon, scratch
with scratch() as folder, daemon(folder) as server:
    print(server.pid, folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_daemon_and_removes_its_folder(number: signal.Signals) -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=BENCHMARKS) as program:
        try:
            assert program.stdout is not None
            pid, folder = program.stdout.readline().split(maxsplit=1)
            program.send_signal(number)
            assert program.wait(60) == 128 + number
        finally:
            program.kill()
    assert not _runs(int(pid)) and not Path(folder.strip()).exists()


def _runs(pid: int) -> bool:
    """Returns True if a process is still there, which nobody has waited for."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True
