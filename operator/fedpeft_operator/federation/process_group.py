"""Child processes that never outlive this one, each with a log of its own.

Notable: a child leads a process group, so Ctrl-C reaches this process alone and what a child started ends with it;
on Linux the kernel ends a child when this process is killed outright. A child asked to end gets `GRACE_S` to do so.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from fedpeft.errors import LocalError

GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL."""
LOOK_PAUSE_S = 0.05
"""Pause between two looks at the children."""
LAST_LINES = 15
"""Lines of a dead child's log that its error shows."""

# Runs in the child before the program: PR_SET_PDEATHSIG (1) is kept across exec. It is asked for there and not in a
# preexec_fn, which is unsafe beside the threads of gRPC.
_TETHER = (
    "import ctypes, os, signal, sys\n"
    "if sys.platform == 'linux':\n"
    "    ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]):\n"
    "    sys.exit('the process that started this one is gone')\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])\n"
)


class Child:
    """One Python process with its log.

    Args:
        name: Name for people.
        arguments: The interpreter's arguments, for example ("-m", "fedpeft_server").
        log: The file that its standard output and standard error are appended to.
        environment: Variables beside this process's own.
    """

    def __init__(self, name: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log = log
        command = [sys.executable, "-c", _TETHER, str(os.getpid()), *arguments]
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """True if it has ended; it is not reaped by looking, so its id stays its own."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    async def until_ended(self) -> None:
        """Waits until it has ended."""
        while True:
            if self.ended:
                return
            await asyncio.sleep(LOOK_PAUSE_S)

    def ask_to_end(self) -> None:
        """Sends SIGTERM."""
        if not self.ended:
            os.kill(self.pid, signal.SIGTERM)

    def end(self) -> int:
        """Kills what is left of its process group and reaps it; returns its exit code."""
        if self._process.returncode is None:
            # Before it is reaped its id, and so its group's, cannot belong to anybody else.
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()

    def death(self) -> LocalError:
        """Returns the error that says how it ended, with the last lines of its log."""
        code = self.end()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        text = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        lines = "".join(f"\n  {line}" for line in text) or "\n  (it is empty)"
        return LocalError(f"{self.name} {how}; the end of its log, {self.log}:{lines}")


class ProcessGroup:
    """The child processes of one command; leaving it ends them, the last started first. An async context manager.

    Args:
        logs: Folder of the logs; made if missing.
        environment: Variables of every child beside this process's own.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = environment
        self.children: list[Child] = []

    async def __aenter__(self) -> Self:
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LocalError(f"cannot make {self._logs}: {error.strerror}") from None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._end_in_order()
        finally:
            for child in self.children:
                child.end()

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Starts a Python process under a name; its log is NAME.log."""
        child = Child(name, arguments, self._logs / f"{name}.log", self._environment)
        self.children.append(child)
        return child

    async def watch(self) -> NoReturn:
        """Raises when a child ends.

        Raises:
            LocalError: With the last lines of its log.
        """
        while True:
            self.check()
            await asyncio.sleep(LOOK_PAUSE_S)

    def check(self) -> None:
        """Checks that every child is alive.

        Raises:
            LocalError: With the last lines of its log.
        """
        for child in self.children:
            if child.ended:
                raise child.death()

    async def _end_in_order(self) -> None:
        """Asks all but the first to end, then the first, which the others talk to."""
        for group in (self.children[1:], self.children[:1]):
            for child in group:
                child.ask_to_end()
            try:
                async with asyncio.timeout(GRACE_S):
                    for child in group:
                        await child.until_ended()
            except TimeoutError:
                continue  # what is left is killed when the group is left


def free_ports(count: int) -> list[int]:
    """Returns so many TCP ports of the loopback interface that nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
