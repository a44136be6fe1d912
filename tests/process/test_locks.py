"""A folder is one process's at a time: who has it is told, and what a killed one left locks nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import StateInvalid
from fedpeft.process import locks


def directory(folder: Path) -> AbstractContextManager[None]:
    return locks.directory(folder, f"--data-dir {folder}", "server", "name another folder")


def results(folder: Path) -> AbstractContextManager[None]:
    return locks.results(folder, "server")


both = pytest.mark.parametrize("hold", [directory, results])


@both
def test_the_second_is_told_who_has_it(hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(StateInvalid) as told, hold(tmp_path):
            pass
        assert f"{tmp_path} is in use by another server (process {os.getpid()})" in told.value.message
        assert told.value.message.endswith("; stop it first, or name another folder")
    with hold(tmp_path):
        assert True, "it was let go"


def test_a_look_shuts_nobody_out(tmp_path: Path) -> None:
    assert locks.holder_of(tmp_path) is None
    with directory(tmp_path):
        assert locks.holder_of(tmp_path) == str(os.getpid())
    assert locks.holder_of(tmp_path) is None
    looker = os.open(tmp_path / locks.LOCK, os.O_RDONLY)
    assert locks.attempt(looker, shared=True)
    threading.Timer(locks.GLANCE_S / 4, os.close, (looker,)).start()
    with directory(tmp_path):
        assert locks.holder_of(tmp_path) == str(os.getpid())


def test_the_end_of_a_process_lets_it_go(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from fedpeft.process import locks\n"
        "with locks.directory(pathlib.Path(sys.argv[1]), 'it', 'server', ''): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert locks.holder_of(tmp_path) == str(process.pid)
        process.kill()
    with directory(tmp_path):
        assert locks.holder_of(tmp_path) == str(os.getpid())


@both
def test_a_file_system_without_locks_is_used_and_said(
    hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with capture_logs() as said, hold(tmp_path):
        assert locks.holder_of(tmp_path) is None, "nobody can know"
    assert [line["event"] for line in said] == ["this file system has no locks: let nothing else write there"]


@both
def test_a_folder_that_cannot_be_written_is_named(
    hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path
) -> None:
    words = r"locking .*/gone/\.?lock failed: No such file or directory"
    with pytest.raises(StateInvalid, match=words), hold(tmp_path / "gone"):
        pass


def test_results_keep_nothing_of_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("1")  # of a process that was killed
    with results(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_blocks_of_a_folder_take_turns_and_leave_nothing(tmp_path: Path) -> None:
    entered = threading.Event()

    def second() -> None:
        with locks.in_turn(tmp_path):
            entered.set()

    other = threading.Thread(target=second)
    with locks.in_turn(tmp_path):
        other.start()
        assert not entered.wait(0.1)
    assert entered.wait(5)
    other.join()
    assert list(tmp_path.iterdir()) == []
