"""Faults of a process that it does to itself when the harness says so, through memory that both share.

A process counts its effects on the disk, and work on its threads, and dies by SIGKILL before a given one: a
transaction is work on a thread. What is forced to disk is noted outside of it, for the failure of its power.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc.aio._utils

from .forced import Journal

_WANTED, _DONE = struct.Struct("dqq"), struct.Struct("qq")
NEVER = -1
EFFECTS = ("fsync", "fdatasync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir", "link", "ftruncate")


class Switches:
    """The faults of one machine; each side writes what is its own.

    Attributes:
        wall_s: Error of the clock.
        failing: Syncs that fail, from the first life on.
        dies_before: The effect before which the process dies, counted from the first life on.
        failed: Syncs that failed so far, by the process.
        effects: Effects so far, likewise.
    """

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self.wall_s, self.failing, self.dies_before = 0.0, 0, NEVER
        self.failed = self.effects = 0
        self.order()
        self.told()

    def order(self) -> None:
        """Tells the process."""
        self._shared[: _WANTED.size] = _WANTED.pack(self.wall_s, self.failing, self.dies_before)

    def ordered(self) -> None:
        """Reads what was ordered."""
        self.wall_s, self.failing, self.dies_before = _WANTED.unpack(self._shared[: _WANTED.size])

    def told(self) -> None:
        """Tells the harness."""
        self._shared[_WANTED.size : _WANTED.size + _DONE.size] = _DONE.pack(self.failed, self.effects)

    def look(self) -> None:
        """Reads what the process told."""
        self.failed, self.effects = _DONE.unpack(self._shared[_WANTED.size : _WANTED.size + _DONE.size])


def obey(switches: Switches, journal: Path | None) -> None:
    """Has this process do as the switches say, for its whole life."""
    switches.look()
    _take_clock(switches)
    _take_syncs(switches, journal)

    def effect() -> None:
        switches.ordered()
        if switches.effects == switches.dies_before:
            os.kill(os.getpid(), signal.SIGKILL)
        switches.effects += 1
        switches.told()

    for name in EFFECTS:
        setattr(os, name, _after(effect, getattr(os, name)))
    submit = ThreadPoolExecutor.submit

    def submitted(pool: Any, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        def done(*args: Any, **kwargs: Any) -> Any:
            effect()
            result = work(*args, **kwargs)
            effect()
            return result

        return submit(pool, done, *args, **kwargs)

    ThreadPoolExecutor.submit = submitted  # type: ignore[method-assign]


def _take_syncs(switches: Switches, journal: Path | None) -> None:
    noted = Journal(journal) if journal else None

    def forced(sync: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            switches.ordered()
            if switches.failed < switches.failing:
                switches.failed += 1
                switches.told()
                if noted:
                    noted.failed(descriptor)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            sync(descriptor)
            if noted:
                noted.forced(descriptor)

        return call

    os.fsync, os.fdatasync = forced(os.fsync), forced(os.fdatasync)  # type: ignore[assignment]


def _after(effect: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        effect()
        return function(*args, **kwargs)

    return call


def _take_clock(switches: Switches) -> None:
    real, real_ns = time.time, time.time_ns

    def wall() -> float:
        switches.ordered()
        return real() + switches.wall_s

    def wall_ns() -> int:
        switches.ordered()
        return real_ns() + int(switches.wall_s * 1e9)

    time.time, time.time_ns = wall, wall_ns
    # gRPC's core reads the machine's clock, which does not jump: deadlines that are made for it must not either.
    grpc.aio._utils.time = SimpleNamespace(time=real)  # type: ignore[assignment]
