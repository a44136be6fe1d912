"""A fork of the preloaded process (`tests/preloaded`) has the surroundings of the process that it stands for."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import process_itself

pytestmark = pytest.mark.usefixtures("preloaded")


def test_a_fork_has_folder_umask_and_limits_of_what_it_stands_for_and_is_killed_with_it(tmp_path: Path) -> None:
    files = 500, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command = [sys.executable, "-m", "fedpeft_client.worker.process"]
    limited = ["bash", "-c", f'ulimit -Sn {files[0]}; exec "$@"', "bash", *command]
    with subprocess.Popen(limited, cwd=tmp_path, umask=0o027, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert soon(lambda: process_itself(process.pid) != process.pid)
            fork = Path("/proc", str(process_itself(process.pid)))
            assert soon(lambda: os.readlink(fork / "cwd") == str(tmp_path))
            assert soon(lambda: "Umask:\t0027" in (fork / "status").read_text())
            assert soon(lambda: resource.prlimit(int(fork.name), resource.RLIMIT_NOFILE) == files)
        finally:
            process.kill()
    assert soon(lambda: not fork.exists())


def soon(met: Callable[[], bool]) -> bool:
    """Waits until something is so; returns False if it is not within a while."""
    end = time.monotonic() + 20
    while not met():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
