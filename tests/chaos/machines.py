"""Machines of a world: each a folder, a process of its own and the switches of its faults.

A machine whose process ended by a fault is started again after a while; one that ended by itself with an error, or by a
full disk, after `RESTART_S`, as a supervisor does.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import struct
import time
from collections.abc import Callable
from pathlib import Path

from simulated_time.machines import mount

from . import processes
from .forced import ForcedDisk
from .switches import NEVER, Switches, obey

ROOM_BYTES = 48 * 1024 * 1024
RESTART_S = 0.5
FRAME, HEADER = struct.Struct(">IIII"), 32


class Machine:
    """A machine with one process.

    Args:
        name: Its name.
        place: Folder of the world.
        drawn: Decides what a failure of the power takes.
        main: The process, given the machine's disk.
        own_disk: True for a disk of a size, whose power can fail.
        lies: True if that disk forces nothing.
        leaves_by: The signal by which the process is asked to end.
        prepare: Puts onto the disk what is there before the first start.
    """

    def __init__(
        self,
        name: str,
        place: Path,
        drawn: random.Random,
        main: Callable[[Path], int | None],
        *,
        own_disk: bool,
        lies: bool = False,
        prepare: Callable[[Path], None] = lambda _: None,
        leaves_by: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self._main = main
        self._drawn = drawn
        self._place = place / name
        self._logs = place / "logs"
        self._journal = place / f"{name}.journal" if own_disk else None
        self._lies = lies
        self._leaves_by = leaves_by
        self._place.mkdir()
        if own_disk:
            mount(self._place, ROOM_BYTES)
        (self._place / "0").mkdir()
        prepare(self._place / "0")
        self.disk = ForcedDisk(self._place / "0")
        self.switches = Switches()
        self.pid: int | None = None
        self.lives = 0
        self.deaths = 0
        self.cpu_s = 0.0
        self.due: float | None = None
        """The moment at which it is started again."""
        self.away_s = RESTART_S
        """Time until that, after a death before an effect."""
        self.loses_power = False
        self.is_stopped = False
        self.is_leaving = False
        self._left_bytes: int | None = None
        self.ends: list[tuple[int, str]] = []
        """Its ends that nobody brought about: the life, and how it ended."""

    def start(self) -> None:
        """Starts the process."""
        log, self.due = self._logs / f"{self.name}.{self.lives}.log", None
        self.lives += 1
        self.is_leaving = self.is_stopped = False

        def main() -> int | None:
            obey(self.switches, None if self._lies else self._journal)
            return self._main(self.disk.path)

        self.pid = processes.start(main, log)

    def look(self, now: float) -> None:
        """Takes note of the process's end, and starts it again when that is due."""
        if self.pid is not None:
            ended, status, used = os.wait4(self.pid, os.WNOHANG)
            if ended:
                self._ended(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, now)
        elif self.due is not None and now >= self.due:
            self.start()

    def _ended(self, code: int, used_s: float, now: float) -> None:
        self.pid = None
        self.cpu_s += used_s
        self.switches.look()
        at_effect = self.switches.dies_before != NEVER and self.switches.effects == self.switches.dies_before
        if at_effect:
            self.dies_before(NEVER)
        if code == -signal.SIGKILL:
            self._fail()
        elif not (self.is_leaving and self._may_leave(code)):
            self.ends.append((self.lives - 1, f"{self.name} life {self.lives - 1} ended with {code}"))
        self.due = now + (self.away_s if code == -signal.SIGKILL or self.is_leaving else RESTART_S)

    def _may_leave(self, code: int) -> bool:
        """Returns True for the code of a process that was asked to end, before it looked after its signals or later."""
        return code in (0, -signal.SIGTERM) or self._leaves_by is signal.SIGQUIT  # which says that it did not shut down

    def _fail(self) -> None:
        """Leaves on the disk what is left of it."""
        self.deaths += 1
        if self._journal is not None:
            self.disk.take(self._journal)
        if not self.loses_power:
            return
        had, left_bytes = self.disk.path, self._left_bytes
        self.fill(None)  # the copy needs room
        self.disk = self.disk.failed_over(self._place / str(self.deaths), self._drawn)
        for wal in self.disk.path.rglob("*-wal"):
            tear(wal, self._drawn)
        processes.remove(had)
        self.fill(left_bytes)

    # Faults.

    def kill(self, away_s: float, *, power: bool) -> None:
        """Kills the process; with `power`, what was not forced to disk may be gone."""
        self.away_s, self.loses_power = away_s, power
        self.signal(signal.SIGKILL)

    def dies_before(self, effect: int) -> None:
        """Has the process die before one of its effects, counted from its first life on."""
        self.switches.dies_before = effect
        self.switches.order()

    def leave(self, away_s: float) -> None:
        """Asks the process to end."""
        self.away_s, self.is_leaving = away_s, True
        self.signal(self._leaves_by)

    def signal(self, number: int) -> None:
        """Sends the process a signal, if there is one."""
        if self.pid is not None:
            os.kill(self.pid, number)

    def fill(self, left_bytes: int | None) -> None:
        """Fills the disk but for so many bytes; None makes room again."""
        self._left_bytes = left_bytes
        ballast = self._place / "ballast"
        ballast.unlink(missing_ok=True)
        if left_bytes is not None:
            free = os.statvfs(self._place)
            wanted = free.f_bavail * free.f_frsize - left_bytes
            if wanted > 0:
                try:
                    with ballast.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, wanted)
                except OSError:  # the process took some of it meanwhile
                    ballast.unlink(missing_ok=True)

    def end(self, patience_s: float) -> None:
        """Ends the process for good."""
        self.due = None
        self.signal(signal.SIGCONT)
        self.leave(0.0)
        until = time.monotonic() + patience_s
        while self.pid is not None and time.monotonic() < until:
            self.look(time.monotonic())
            time.sleep(0.01)
        if self.pid is not None:
            self.ends.append((self.lives - 1, f"{self.name} did not end within {patience_s:.0f} s of SIGTERM"))
            self.signal(processes.SAY_WHERE)
            time.sleep(0.5)
            self.signal(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None


def tear(wal: Path, drawn: random.Random) -> None:
    """Cuts SQLite's log at a random byte after its last commit, which was forced to disk before anybody heard of it."""
    data = wal.read_bytes()
    if len(data) <= HEADER:
        return
    page, salt = int.from_bytes(data[8:12], "big"), data[16:24]
    end = HEADER
    for at in range(HEADER, len(data) - 24 - page + 1, 24 + page):
        _, pages, *found = FRAME.unpack_from(data, at)
        if struct.pack(">II", *found) != salt:
            break  # of an older log
        if pages:
            end = at + 24 + page
    wal.write_bytes(data[: drawn.randint(end, len(data))])


def read_only(database: Path) -> sqlite3.Connection:
    """Opens a database that nobody writes any more."""
    return sqlite3.connect(f"file:{database}?mode=ro", uri=True)
