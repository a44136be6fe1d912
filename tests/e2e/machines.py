"""Two machines, as network namespaces with a wire between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .conftest import WAIT_S

HEAD, SITE = "10.77.0.1", "10.77.0.2"
"""The tutorial names the first."""
BIN = Path(sys.executable).parent


class Machines:
    """Two namespaces with a wire between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head, self.site = f"fedpeft-head-{os.getpid()}", f"fedpeft-site-{os.getpid()}"
        self.started: list[subprocess.Popen[bytes]] = []

    def lay(self) -> None:
        for name in (self.head, self.site):
            ip("netns", "add", name)
        ip("-n", self.head, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", self.site)
        for name, address in ((self.head, HEAD), (self.site, SITE)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            for link in ("lo", "wire"):
                ip("-n", name, "link", "set", link, "up")

    def clear(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        for name in (self.head, self.site):
            subprocess.run(["ip", "netns", "del", name], check=False)

    def run(self, machine: str, command: str) -> str:
        """Runs a line of shell on one of them to its end and returns what it prints."""
        done = subprocess.run(self._on(machine, command), capture_output=True, text=True, timeout=WAIT_S, **self._where)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def start(self, machine: str, log: str, command: str) -> subprocess.Popen[bytes]:
        """Starts a line of shell that stays."""
        with (self.folder / log).open("wb") as file:
            process = subprocess.Popen(
                self._on(machine, f"exec {command}"), stdout=file, stderr=subprocess.STDOUT, **self._where
            )
        self.started.append(process)
        return process

    @property
    def _where(self) -> dict[str, Any]:
        path = f"{BIN}:{os.environ['PATH']}"
        own = {"PATH": path, "XDG_CONFIG_HOME": str(self.folder / "config"), "OMP_NUM_THREADS": "1"}
        return {"cwd": self.folder, "env": {**os.environ, **own}}

    def _on(self, machine: str, command: str) -> list[str]:
        return ["ip", "netns", "exec", machine, "bash", "-c", command]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def laid(folder: Path, *programs: str) -> Iterator[Machines]:
    """Gives two machines, cleared at the end; skips the test where they cannot be had, or a program it needs."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    for program in ("ip", *programs):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: iproute2, tshark)")
    made = Machines(folder)
    try:
        made.lay()
        yield made
    finally:
        made.clear()
