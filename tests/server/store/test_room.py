"""Room on the disk: what can wait is refused in time, and what must go on goes on."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from fedpeft.errors import DiskFull
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.store.blobs.room import Room

from ..conftest import StartDaemon, config, fault, filled

EVERYTHING = 2**62


def test_what_would_take_the_spared_bytes_is_refused_with_the_figures(small_disk: Path) -> None:
    room = Room(small_disk, 500_000)
    room.check("a small thing", 100_000)
    with pytest.raises(DiskFull, match=r"takes 700,000 bytes, .* free .* 500,000 are kept for the server"):
        room.check("a large thing", 700_000)
    assert Room(small_disk).disk().spared_bytes == 1024**2 // 20


async def test_a_folder_of_versions_on_another_disk_must_have_room_too(
    start: StartDaemon, tmp_path: Path, small_disk: Path
) -> None:
    daemon = await start(tmp_path / "data", blobs=str(small_disk / "blobs"))
    run = (await daemon.create(config(rounds={"count": 2, "clients": 1, "quorum": 1}))).id
    (alice,) = await daemon.clients("alice")
    task = await alice.task(run)
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.write(bytes(shutil.disk_usage(small_disk).free - 40_000))
    error = await fault(alice.push(task.ticket, filled(0.5)))
    assert error.message == f"the server's disk is full: {DiskFull.for_sites}"
    error = await fault(daemon.create(config(), request_id="another"))
    assert error.reason == "DISK_FULL"
    assert f"on the disk of {small_disk / 'blobs'}, of which 52,428 are kept" in error.message
    shown = (await daemon.operator.GetStorage(op.GetStorageRequest())).disks
    assert [(disk.place, disk.folder) for disk in shown] == [
        ("data", str(tmp_path / "data")),
        ("blobs", str(small_disk / "blobs")),
    ]
    assert shown[1].size_bytes == 1024**2 and shown[1].free_bytes < shown[1].spared_bytes == 1024**2 // 20
    (small_disk / "ballast").unlink()
    await alice.push(task.ticket, filled(0.5))
    assert (await daemon.until(run, lambda found: found.version == 1)).version == 1


async def test_what_is_stored_is_shown(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(tmp_path / "data")
    await daemon.create(config())
    await asyncio.to_thread(daemon.server.store.measure)
    storage = await daemon.operator.GetStorage(op.GetStorageRequest())
    assert [disk.place for disk in storage.disks] == ["data"], "the folder of versions is on the same disk"
    assert storage.stored_bytes["blobs"] > 0 and storage.stored_bytes["database"] > 0
    assert storage.stored_bytes["spool"] == 0


async def test_uploads_runs_and_encoded_versions_wait_and_all_else_goes_on(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(tmp_path / "data", min_free_bytes=0)
    rules = config(rounds={"count": 2, "clients": 2, "quorum": 2}, codec={"down": "float16"})
    run = (await daemon.create(rules)).id
    alice, bob = await daemon.clients("alice", "bob")
    task, other = await asyncio.gather(alice.task(run), bob.task(run))
    await daemon.end()

    daemon = await start(tmp_path / "data", min_free_bytes=EVERYTHING)
    alice, bob = await daemon.clients("alice", "bob")
    for refused in (alice.push(task.ticket, filled(0.5)), alice.pull(run, 0)):
        assert (await fault(refused)).reason == "DISK_FULL"
    error = await fault(daemon.create(config(), request_id="another"))
    assert error.reason == "DISK_FULL" and "are kept for the server itself" in error.message
    assert (await alice.upload(task.ticket)).state == run_pb2.TICKET_STATE_ISSUED, "the ticket stays good"
    await daemon.operator.PauseRun(op.PauseRunRequest(run=run))
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
    assert (await daemon.run(run)).state == run_pb2.RUN_STATE_RUNNING
    await daemon.end()

    daemon = await start(tmp_path / "data", min_free_bytes=0)
    alice, bob = await daemon.clients("alice", "bob")
    await alice.push(task.ticket, filled(0.5))
    await daemon.end()
    daemon = await start(tmp_path / "data", min_free_bytes=EVERYTHING)
    alice, bob = await daemon.clients("alice", "bob")
    receipt = await alice.push(task.ticket, filled(0.5))
    assert receipt.ticket == task.ticket, "what is here has its receipt"
    await daemon.end()

    daemon = await start(tmp_path / "data", min_free_bytes=0)
    alice, bob = await daemon.clients("alice", "bob")
    daemon.server.store.room._given = EVERYTHING - 1
    daemon.server.store.spool._room = None
    await bob.push(other.ticket, filled(0.25))
    done = await daemon.until(run, lambda found: found.version == 1)
    assert done.state == run_pb2.RUN_STATE_RUNNING, "a fold takes what is spared"


async def test_a_version_that_needs_no_file_is_sent_all_the_same(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(tmp_path / "data", min_free_bytes=0)
    run = (await daemon.create(config())).id
    daemon.server.store.room._given = EVERYTHING
    reader = daemon.client("reader")
    await reader.register(fed.CLIENT_ROLE_EVALUATOR)
    assert (await reader.pull(run, 0))[1]
