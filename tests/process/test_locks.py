"""A folder is one process's at a time: who has it is told, and what a killed one left locks nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import re
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


def file(folder: Path) -> AbstractContextManager[None]:
    return locks.file(folder / "x.db", f"--database {folder / 'x.db'}", "server", "name another database")


every = pytest.mark.parametrize("hold", [directory, results, file])


@every
def test_the_second_is_told_who_has_it(hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path) -> None:
    with hold(tmp_path):
        with pytest.raises(StateInvalid) as told, hold(tmp_path):
            pass
        assert re.search(rf"{tmp_path}\S* is in use by another server \(process {os.getpid()}\)", told.value.message)
        assert re.search(r"; stop it first, or name another (folder|database)$", told.value.message)
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


@every
def test_a_file_system_without_locks_is_used_and_said(
    hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with capture_logs() as said, hold(tmp_path):
        assert locks.holder_of(tmp_path) is None, "nobody can know"
    assert [line["event"] for line in said] == ["this file system has no locks: let nothing else write there"]


@every
def test_a_folder_that_cannot_be_written_is_named(
    hold: Callable[[Path], AbstractContextManager[None]], tmp_path: Path
) -> None:
    words = r"locking .*/gone/(x\.db)?\.?lock failed: No such file or directory"
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


def test_a_file_is_held_by_whatever_path_names_it_and_is_not_locked_itself(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x.db").write_text("data")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "y.db").symlink_to("link/x.db")
    with file(tmp_path / "folder"):
        for other in (tmp_path / "link", tmp_path / "folder" / ".." / "link"):
            with pytest.raises(StateInvalid, match="is in use"), file(other):
                pass
        with pytest.raises(StateInvalid, match="is in use"), locks.file(tmp_path / "y.db", "it", "server", ""):
            pass
        with (tmp_path / "folder" / "x.db").open("r+b") as data:
            assert locks.attempt(data.fileno())
            fcntl.lockf(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["x.db"]
