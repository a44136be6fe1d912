"""Folders and object stores that refuse: at the start, where a flag is wrong, and later, where clients try again."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import DiskFull, FedpeftError, SettingsInvalid, StateInvalid, StoreUnavailable
from fedpeft_server.store.blobs import blobs as module
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.timing import Timing

from ..conftest import StartDaemon, config, fault, filled

REFUSES = "the database or a store refuses"
AWAY = "a store cannot be written; uploads that need it wait until it can"


def read_only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Has nothing be written to a folder any more, as on a file system that was mounted read-only."""
    put = module.obstore.put

    def refusing(store: Any, key: str, data: Any) -> object:
        if Path(store.prefix) == folder:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return put(store, key, data)

    monkeypatch.setattr(module.obstore, "put", refusing)


def said(lines: Any, event: str) -> list[Any]:
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("flag", ["--blobs", "--updates", "--data-dir"])
async def test_a_folder_that_refuses_is_refused_at_the_start(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    folder = tmp_path / "data" / "blobs" if flag == "--data-dir" else tmp_path / "rot"
    read_only(monkeypatch, folder)
    named = {} if flag == "--data-dir" else {flag[2:]: str(folder)}
    with pytest.raises(SettingsInvalid, match=rf"{flag} {folder} failed: Read-only file system; .*another folder"):
        await start(**named)
    monkeypatch.undo()
    await start(**named)
    assert not list(folder.iterdir()), "the trial leaves nothing"


@pytest.mark.parametrize("flag", ["blobs", "updates"])
async def test_a_folder_that_cannot_be_made_is_named_by_its_flag(start: StartDaemon, tmp_path: Path, flag: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateInvalid, match=rf"--{flag} {tmp_path}/file/x failed: Not a directory"):
        await start(**{flag: f"{tmp_path}/file/x"})


async def test_a_full_disk_at_the_first_start_is_named_by_its_flag(start: StartDaemon, small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (small_disk / "ballast").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with pytest.raises(DiskFull, match=rf"--data-dir {small_disk}: .*free some disk space"):
        await start(small_disk)


async def test_a_full_folder_is_said_at_the_start(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errno, "EROFS", errno.ENOSPC)
    read_only(monkeypatch, tmp_path / "rot")
    with capture_logs() as lines:
        await start(updates=str(tmp_path / "rot"))
    (line,) = said(lines, AWAY)
    assert line["store"] == f"--updates {tmp_path / 'rot'}" and "no room" in line["message"]


async def test_an_object_store_that_refuses_at_the_start_is_said(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Blobs) -> None:
        raise StoreUnavailable("no bucket")

    monkeypatch.setattr(Blobs, "try_writing", lambda place: None if place.is_folder else refuse(place))
    with capture_logs() as lines:
        await start(updates="s3://nowhere/updates")
    (line,) = said(lines, AWAY)
    assert (line["log_level"], line["store"], line["message"]) == (
        "warning",
        "--updates s3://nowhere/updates",
        "no bucket",
    )


async def test_an_object_store_that_does_not_answer_holds_up_no_start(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(Blobs, "try_writing", lambda place: None if place.is_folder else answers.wait(30))
    try:
        with capture_logs() as lines:
            await start(timing=Timing(store_answer_s=0.1), updates="s3://nowhere/updates")
    finally:
        answers.set()
    (line,) = said(lines, AWAY)
    assert line["message"] == "no answer in 0.1 seconds"


@pytest.mark.parametrize("place", ["updates", "spool"])
async def test_an_update_waits_for_a_store_that_refuses(start: StartDaemon, tmp_path: Path, place: str) -> None:
    folder = tmp_path / "updates" if place == "updates" else tmp_path / "data" / "spool"
    daemon = await start(updates=str(tmp_path / "updates"))
    run = await daemon.create(config(rounds={"count": 1, "clients": 2}))
    both = await daemon.clients("a", "b")
    tasks = await asyncio.gather(*(client.task() for client in both))
    shutil.rmtree(folder)
    folder.write_text("no folder")
    with capture_logs() as lines:
        errors = [await fault(c.push(t.ticket, filled(1.0))) for c, t in zip(both, tasks, strict=True)]
    assert {error.message for error in errors} == {StoreUnavailable.for_sites}
    (line,) = [line for line in lines if line["log_level"] in ("error", "critical")]
    assert line["event"] == REFUSES and "exc_info" not in line
    assert place == "spool" or f"--updates {folder} failed" in line["message"]
    folder.unlink()
    folder.mkdir()
    for client, task in zip(both, tasks, strict=True):
        await client.push(task.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)


async def test_the_making_of_a_run_waits_for_a_store_that_refuses(start: StartDaemon, tmp_path: Path) -> None:
    folder = tmp_path / "blobs"
    daemon = await start(blobs=str(folder))
    shutil.rmtree(folder)
    folder.write_text("no folder")
    with capture_logs() as lines:
        error: FedpeftError = await fault(daemon.create())
    assert isinstance(error, StoreUnavailable) and f"--blobs {folder} failed" in error.message
    (line,) = [line for line in lines if line["log_level"] in ("error", "critical")]
    assert line["event"] == REFUSES and "exc_info" not in line
    folder.unlink()
    folder.mkdir()
    run = await daemon.create()
    assert [path.name for path in (folder / "runs").iterdir()] == [run.id]
    assert not list((tmp_path / "data" / "spool").iterdir())
