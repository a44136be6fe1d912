"""Processes of a world: forks of one that has imported everything, which die with it."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection
from pathlib import Path

SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of `prctl`."""
SAY_WHERE = signal.SIGUSR2
"""Has a process write into its log where its threads are."""


def start(main: Callable[[], int | None], log: Path, keep: Collection[int] = ()) -> int:
    """Forks a process whose output goes to a file; returns its id.

    Args:
        main: Its work; its exit code is what this returns.
        log: The file.
        keep: Descriptors that it needs.
    """
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        die_with(parent)
        _take_streams(log, keep)
        faulthandler.register(SAY_WHERE)
        code = main() or 0
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at the end of any process
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_with(parent: int) -> None:
    """Has this process killed when its parent ends."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _take_streams(log: Path, keep: Collection[int]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing, written = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for number, stream in enumerate((nothing, written, written)):
        os.dup2(stream, number)
    last = 3
    for number in (*sorted(keep), os.sysconf("SC_OPEN_MAX")):
        os.closerange(last, min(number, 65_536))
        last = number + 1
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def remove(folder: Path) -> None:
    """Removes the folder of a process that is over."""
    shutil.rmtree(folder)
