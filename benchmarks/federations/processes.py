"""Processes of a federation on this machine: started as by a service manager, watched, killed without warning."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from workload import peak_memory_bytes

SILENT_S = 180.0
"""A run in which no round ends for so long is taken for stuck."""

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """The work of a federation: each client adds one to every value, and the server takes the mean.

    Attributes:
        rounds: Rounds of a run.
        clients: Clients, all in every round.
        values: float32 values of the model.
        client_s: Seconds that a client takes in a round, beside what the framework does.
    """

    rounds: int
    clients: int
    values: int
    client_s: float


class Processes:
    """Processes by name, each with a log, a process group of its own, and the same command at every start.

    Args:
        folder: Working directory and place of the logs.
        environment: Variables beside this process's own.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._environment = {**os.environ, **environment}
        self._commands: dict[str, list[str]] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """Starts a process, or starts it again with the command of before."""
        self._commands[name] = list(command) or self._commands[name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                self._commands[name],
                cwd=self.folder,
                env=self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Kills one process outright; what it started lives on, or not, as it would on a server."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def kill_started(self, word: bytes) -> None:
        """Kills outright what the processes have started whose command has a word."""
        for pid in descendants_of(self.folder):
            with suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def peak_bytes(self, name: str, so_far: dict[int, int]) -> None:
        """Notes the most memory that a process, and each that it or one of those started, has had so far, by its id."""
        for pid in _started_by(self._running[name].pid):
            with suppress(OSError, RuntimeError):  # it has ended meanwhile
                so_far[pid] = peak_memory_bytes(pid)

    def said(self, *command: str) -> str:
        """Returns what a command says that ends."""
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    def log(self, name: str) -> str:
        """Returns what a process has said."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """Ends all, and what they have started and left."""
        for process in self._running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pid in descendants_of(self.folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def descendants_of(folder: Path) -> list[int]:
    """Returns the processes whose working directory is in a folder, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
    return found


def _started_by(pid: int) -> list[int]:
    """Returns a process and all that it started, and those in turn."""
    found, at = [pid], 0
    while at < len(found):
        with suppress(OSError):
            for task in Path(f"/proc/{found[at]}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
        at += 1
    return found


def wait_for(reached: Callable[[], T], what: str, most_s: float = SILENT_S) -> T:
    """Returns the first true answer.

    Raises:
        TimeoutError: If none comes in time.
    """
    until = time.monotonic() + most_s
    while time.monotonic() < until:
        if found := reached():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {most_s:.0f} s for {what}")
