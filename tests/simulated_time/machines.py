"""Machines that can be killed at any moment and between any two effects on their disks, and start again from there.

At its death a machine's folder is copied as it is at that instant; the next life gets the copy, in a place of its own.
So what the dying process still does to its files, in the instruction under way, is undone.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import os
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from fedpeft.errors import FedpeftError

from .disk import Disk
from .loop import LIFE, Life, SimulatedLoop
from .wire import OUTSIDE, Wire

MOST_FAULTS = 20
"""A machine that ended with so many is not started again, or a world whose server never starts has no end."""


class Machine:
    """A machine with one process, which is started again when it dies or ends.

    Args:
        name: The machine's name.
        place: Folder of its disks, one for each life.
        wire: Its connection to the others.
        main: The process, given its disk.
        room_bytes: Size of its disks together; None for no limit.
    """

    def __init__(
        self,
        name: str,
        place: Path,
        wire: Wire,
        main: Callable[[Path], Awaitable[None]],
        room_bytes: int | None = None,
    ) -> None:
        self.name = name
        self._place = place / name
        self._wire = wire
        self._main = main
        self.deaths = 0
        self.faults: list[str] = []
        self.was_full = False
        self.ends: list[str] = []
        """Errors that a process ended with because of a full disk."""
        self.wall_s = 0.0
        self.life: Life | None = None
        if room_bytes is not None:
            self._place.mkdir(parents=True)
            mount(self._place, room_bytes)
        self.disk = Disk(self._place / "0")
        self._left_bytes: int | None = None
        self.dies_after: int | None = None
        """Effects of the present life after which the machine dies."""
        self.away_s = 1.0
        """Time until it starts again after that."""
        self.loses_power = False
        self.graveyard: list[asyncio.Task[None]] = []

    def fill(self, left_bytes: int | None) -> None:
        """Fills the disk but for so many bytes; None makes room again."""
        self._left_bytes = left_bytes
        self.was_full = True
        ballast = self._place / "ballast"
        ballast.unlink(missing_ok=True)
        if left_bytes is not None:
            free = os.statvfs(self._place)
            with ballast.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left_bytes))

    @property
    def is_up(self) -> bool:
        """True while a process runs."""
        return self.life is not None and not self.life.is_over

    def start(self) -> None:
        """Starts the process."""
        self.life = life = Life(self.name, self.wall_s)
        context = contextvars.Context()
        context.run(LIFE.set, life)
        task = self._wire.loop.create_task(self._live(), context=context)
        self.graveyard.append(task)  # a task of a life that is over must not be collected: its `finally` would run
        task.add_done_callback(partial(self._ended, life), context=OUTSIDE)

    async def _live(self) -> None:
        await self._main(self.disk.path)

    def _ended(self, life: Life, task: asyncio.Task[None]) -> None:
        if life.is_over:  # killed in the instant in which it ended: who killed it has it started again
            return
        life.is_over = True
        error = None if task.cancelled() else task.exception()
        if isinstance(error, FedpeftError) and self.was_full:
            self.ends.append(f"{type(error).__name__}: {error}")
        elif error is not None:
            self.faults.append(f"{type(error).__name__}: {error}")
        self._wire.break_all(self.name)
        if not isinstance(error, Exception | None):
            raise error
        if error is not None and len(self.faults) < MOST_FAULTS:  # as a supervisor does
            self._wire.later(self._wire.loop.now + 5.0, self.start)

    def kill(self, away_s: float, *, power: bool = False) -> None:
        """Ends the process where it stands, and has another one started later; with `power`, the machine's fails."""
        if not self.is_up:
            return
        assert self.life is not None
        self.deaths += 1
        self.life.is_over = True
        self.dies_after = None
        place, left_bytes = self._place / str(self.deaths), self._left_bytes
        if left_bytes is not None:
            self.fill(None)
        self.disk = self.disk.after_a_power_failure(place, self._wire.drawn) if power else self.disk.after_a_kill(place)
        if left_bytes is not None:
            self.fill(left_bytes)
        for port, server in list(self._wire.servers.items()):
            if server.life is self.life:
                del self._wire.servers[port]
        self._wire.break_all(self.name)
        self._wire.later(self._wire.loop.now + away_s, self.start)

    def effect(self) -> None:
        """Counts an effect of the present life; the machine may die before it."""
        assert self.life is not None
        self.life.effects += 1
        if self.dies_after is not None and self.life.effects > self.dies_after:
            self.kill(self.away_s, power=self.loses_power)


def own_mounts() -> None:
    """Has this process see mounts of its own, which go with it."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "no mounts of its own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(place: Path, room_bytes: int) -> None:
    """Makes a folder a disk of a size."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room_bytes}", "tmpfs", place], check=True)


def watch_effects(machines: dict[str, Machine], loop: SimulatedLoop, *, disks_lie: bool) -> None:
    """Has every effect on a disk counted, for a process that ends with the world: before each a machine may die."""

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            life = LIFE.get()
            machine = machines.get(life.name) if life and not life.is_over else None
            if machine is not None and machine.life is life:
                machine.effect()
            return function(*args, **kwargs)

        return call

    fsync = os.fsync

    def forced(descriptor: int) -> None:
        fsync(descriptor)
        life = LIFE.get()
        if life is not None and not life.is_over and not disks_lie:
            machines[life.name].disk.forced(descriptor)

    os.fsync = os.fdatasync = forced  # type: ignore[assignment]
    for name in ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "ftruncate"):
        setattr(os, name, watched(getattr(os, name)))
    whole = loop.run_in_executor

    def run_in_executor(executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        return whole(executor, watched(func), *args)

    loop.run_in_executor = run_in_executor  # type: ignore[method-assign]
