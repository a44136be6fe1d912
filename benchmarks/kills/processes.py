"""Processes of a federation on this machine, started as a service manager would, and killed without warning."""

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

ROUNDS, CLIENTS = 8, 3
AWAY_S = 3.0
"""A killed process is started again after so long, as systemd does."""
TOLERANCE = 1e-6
"""Each client adds one a round; means of three in floating point are off by less."""
SILENT_S = 180.0
"""A run in which no round ends for so long is taken for stuck."""

T = TypeVar("T")


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


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run whose process was killed.

    Attributes:
        rounds: Rounds that ended, of `ROUNDS`.
        updates: Updates that were counted, of `ROUNDS * CLIENTS`.
        status: The framework's own word on the run at the end.
        right: True if the result is the one of a run in which nothing was killed.
        pause_s: Seconds from the kill until the next round ended; None if none did.
    """

    rounds: int
    updates: int
    status: str
    right: bool
    pause_s: float | None


def descendants_of(folder: Path) -> list[int]:
    """Returns the processes whose working directory is in a folder, whoever started them."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "cwd").readlink().is_relative_to(folder):
                found.append(int(entry.name))
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


def last_round(rounds: Callable[[], int], over: Callable[[], bool], killed_at: float) -> float | None:
    """Waits until the run is over, or stuck; returns the seconds until the first round after the kill, None if none."""
    before, pause_s, moved = rounds(), None, time.monotonic()
    while time.monotonic() - moved < SILENT_S:
        now = rounds()
        if now > before:
            before, moved = now, time.monotonic()
            pause_s = moved - killed_at if pause_s is None else pause_s
        if now >= ROUNDS or over():
            break
        time.sleep(2)
    return pause_s
