"""Stored files that rot: what is read is what was written, or it is reported, set aside, and asked for again."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import BlobCorrupt
from fedpeft.rounds.state_machine import ticket_id
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.store.blobs import integrity
from fedpeft_server.store.store import state_key, version_key

from ..conftest import Daemon, StartDaemon, config, fault, filled

ISSUED, RECEIVED = run_pb2.TICKET_STATE_ISSUED, run_pb2.TICKET_STATE_RECEIVED
RUNNING, PAUSED = run_pb2.RUN_STATE_RUNNING, run_pb2.RUN_STATE_PAUSED


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = pytest.mark.parametrize("damage", [flip, truncate, remove])
Damage = Callable[[Path], None]


def folder(daemon: Daemon) -> Path:
    return daemon.server.settings.data_dir


def spooled(daemon: Daemon, run: str, client: str, number: int = 1) -> Path:
    (path,) = (folder(daemon) / "spool").glob(f"{ticket_id(run, number, client)}.*.update")
    return path


async def audited(daemon: Daemon, action: str) -> list[dict[str, Any]]:
    entries = await daemon.server.store.transact(daemon.server.store.db.transactions.entries_after, 0, 1000)
    return [json.loads(entry.details) for entry in entries if entry.action == action]


def corrupt_files(daemon: Daemon, kind: str) -> float:
    value = daemon.server.metrics.registry.get_sample_value("fedpeft_corrupt_files_total", {"kind": kind})
    assert value is not None
    return value


async def undisturbed(daemon: Daemon) -> dict[str, bytes]:
    run = (await daemon.create(config(rounds={"count": 1, "clients": 2}), request_id="undisturbed")).id
    clients = await daemon.clients("alice", "bob")
    tasks = await asyncio.gather(*(client.task(run) for client in clients))
    for client, task, value in zip(clients, tasks, (0.5, 0.25), strict=True):
        await client.push(task.ticket, filled(value))
    await daemon.until(run, lambda found: found.version == 1)
    return {name: values.tobytes() for name, values in (await daemon.adapter(run, 1)).items()}


class TestUpdates:
    @DAMAGES
    @pytest.mark.parametrize("restarts", [False, True])
    async def test_one_that_rots_before_its_fold_is_asked_for_again(
        self, start: StartDaemon, tmp_path: Path, damage: Damage, restarts: bool
    ) -> None:
        daemon = await start(tmp_path / "data")
        wanted = await undisturbed(daemon)
        run = (await daemon.create(config(rounds={"count": 1, "clients": 2}))).id
        alice, bob = await daemon.clients("alice", "bob")
        task, other = await asyncio.gather(alice.task(run), bob.task(run))
        await alice.push(task.ticket, filled(0.5))
        path = spooled(daemon, run, "alice")
        if restarts:
            await daemon.end()
            damage(path)
            daemon = await start(tmp_path / "data")
            alice, bob = await daemon.clients("alice", "bob")
        else:
            damage(path)
        waiting = asyncio.create_task(alice.task(run))
        await bob.push(other.ticket, filled(0.25))
        again = await waiting
        assert (again.ticket, again.seed, again.version) == (task.ticket, task.seed, task.version)
        standing = await alice.upload(task.ticket)
        assert standing.state == ISSUED and standing.committed_bytes == 0
        assert standing.reason == "the server lost the update", "a site is told no place of the server"
        (lost,) = await audited(daemon, "update.lost")
        assert (lost["client"], lost["ticket"]) == ("alice", task.ticket) and str(folder(daemon)) in lost["reason"]
        assert corrupt_files(daemon, "update") == 1
        aside = list((folder(daemon) / "spool").glob(f"*.{integrity.SUFFIX}"))
        assert len(aside) == (damage is not remove)

        first = await alice.push(task.ticket, filled(0.5))
        await daemon.until(run, lambda found: found.version == 1)
        assert await alice.push(task.ticket, filled(0.5)) == first, "a repetition has the same receipt"
        assert {n: v.tobytes() for n, v in (await daemon.adapter(run, 1)).items()} == wanted
        counted = {c.id: c.updates for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients}
        assert counted["alice"] == counted["bob"] == 2, "one a run"
        (held,) = await daemon.rounds(run)
        assert {t.client: (t.state, t.reason) for t in held.tickets} == {"alice": (RECEIVED, ""), "bob": (RECEIVED, "")}
        assert [path for path in aside if not path.exists()] == [], "what was set aside stays"

    async def test_another_client_is_sampled_where_it_does_not_come_again(self, daemon: Daemon) -> None:
        run = (await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 2}))).id
        alice, bob = await daemon.clients("alice", "bob")
        task, other = await asyncio.gather(alice.task(run), bob.task(run))
        await alice.push(task.ticket, filled(0.5))
        flip(spooled(daemon, run, "alice"))
        await bob.push(other.ticket, filled(0.25))
        assert (await alice.task(run)).ticket == task.ticket
        await alice.withdraw(task.ticket, "it is not here any more")
        (carol,) = await daemon.clients("carol")
        await carol.push((await carol.task(run)).ticket, filled(0.5))
        done = await daemon.until(run, lambda found: found.version == 1)
        assert done.state == run_pb2.RUN_STATE_COMPLETED
        assert await audited(daemon, "update.lost")

    async def test_a_whole_upload_that_rots_before_its_receipt_is_sent_again(
        self, start: StartDaemon, tmp_path: Path
    ) -> None:
        """A process that dies between the file and the receipt leaves a file that the next one must not trust."""
        daemon = await start(tmp_path / "data")
        run = (await daemon.create(config(rounds={"count": 1, "clients": 2}))).id
        alice, bob = await daemon.clients("alice", "bob")
        task, _ = await asyncio.gather(alice.task(run), bob.task(run))
        await alice.push(task.ticket, filled(0.5))
        path = spooled(daemon, run, "alice")
        data = path.read_bytes()
        await daemon.server.store.file(daemon.server.store.spool.remove_all, (task.ticket,))
        path.write_bytes(bytes(len(data)))
        store = daemon.server.store.spool
        store._scan()
        assert store.position(task.ticket, bytes.fromhex(path.name.split(".")[1])) == len(data)
        row = await daemon.server.store.transact(daemon.server.store.db.update, task.ticket)
        assert row is not None
        with store.writer(task.ticket, row.manifest) as writer:
            assert writer.position == 0, "nothing of it is trusted"


class TestVersions:
    @DAMAGES
    @pytest.mark.parametrize("down", ["float32", "float16"])
    async def test_the_newest_is_never_served_and_pauses_the_run(
        self, daemon: Daemon, damage: Damage, down: str
    ) -> None:
        run = (await daemon.create(config(rounds={"count": 2, "clients": 1}, codec={"down": down}))).id
        (alice,) = await daemon.clients("alice")
        await alice.push((await alice.task(run)).ticket, filled(0.5))
        await daemon.until(run, lambda found: found.version == 1)
        path = folder(daemon) / "blobs" / version_key(run, 1)
        good = path.read_bytes()
        damage(path)
        error = await fault(alice.pull(run, 1))
        assert error.message == BlobCorrupt.for_sites
        found = await daemon.run(run)
        assert found.state == PAUSED
        told = (
            (await alice.register()).runs,
            await alice.stub.AwaitRound(fed.AwaitRoundRequest(), metadata=alice.metadata),
        )
        assert "is not what was stored" in str(told) and str(folder(daemon)) not in str(told)
        assert version_key(run, 1) not in str(told)
        assert (
            version_key(run, 1) in found.reason
            and "from a backup; then resume the run, or roll the run back" in found.reason
        )
        assert corrupt_files(daemon, "version") == 1
        aside = [p for p in (folder(daemon) / "blobs").rglob("*") if integrity.SUFFIX in p.parts and p.is_file()]
        assert len(aside) == (damage is not remove)
        assert (await audited(daemon, "run.paused"))[-1]["reason"] == found.reason

        assert (await fault(alice.pull(run, 1))).reason == "BLOB_CORRUPT", "nor is it after that"
        path.write_bytes(good)
        await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
        await alice.pull(run, 1)
        await alice.push((await alice.task(run)).ticket, filled(0.5))
        done = await daemon.until(run, lambda found: found.version == 2)
        assert done.state == run_pb2.RUN_STATE_COMPLETED

    @DAMAGES
    @pytest.mark.parametrize("kind", ["version", "state"])
    async def test_what_a_fold_begins_with_pauses_the_run(self, daemon: Daemon, damage: Damage, kind: str) -> None:
        rules = config(rounds={"count": 2, "clients": 1}, aggregation={"strategy": "fedavgm"})
        run = (await daemon.create(rules)).id
        (alice,) = await daemon.clients("alice")
        await alice.push((await alice.task(run)).ticket, filled(0.5))
        await daemon.until(run, lambda found: found.version == 1)
        key = {"version": version_key, "state": state_key}[kind](run, 1)
        path = folder(daemon) / "blobs" / key
        good = path.read_bytes()
        damage(path)
        await alice.push((await alice.task(run)).ticket, filled(0.5))
        found = await daemon.until(run, lambda found: found.state == PAUSED)
        assert found.reason.startswith("round 2 could not be folded; the server found: ") and key in found.reason
        assert "then resume the run, or roll the run back" in found.reason
        assert corrupt_files(daemon, kind) == 1
        path.write_bytes(good)
        await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run))
        assert (await daemon.until(run, lambda found: found.version == 2)).state == run_pb2.RUN_STATE_COMPLETED

    async def test_a_trusted_file_that_a_fold_finds_corrupt_is_reported_too(self, daemon: Daemon) -> None:
        """A disk may give other bytes though the file looks the same; the fold reads all of them."""
        run = (await daemon.create(config(rounds={"count": 1, "clients": 1}))).id
        (alice,) = await daemon.clients("alice")
        task = await alice.task(run)
        await alice.pull(run, 0)
        path = folder(daemon) / "blobs" / version_key(run, 0)
        looks = path.stat()
        flip(path)
        os.utime(path, ns=(looks.st_atime_ns, looks.st_mtime_ns))
        await alice.push(task.ticket, filled(0.5))
        found = await daemon.until(run, lambda found: found.state == PAUSED)
        assert version_key(run, 0) in found.reason
        assert corrupt_files(daemon, "version") == 1 and not path.exists()

    async def test_an_old_one_is_reported_and_the_run_goes_on(self, daemon: Daemon) -> None:
        run = (await daemon.create(config(rounds={"count": 2, "clients": 1}))).id
        (alice,) = await daemon.clients("alice")
        await alice.push((await alice.task(run)).ticket, filled(0.5))
        await daemon.until(run, lambda found: found.version == 1)
        flip(folder(daemon) / "blobs" / version_key(run, 0))

        async def download(version: int) -> None:
            async for _ in daemon.operator.DownloadAdapter(op.DownloadAdapterRequest(run=run, version=version)):
                pass

        for _ in range(2):
            assert (await fault(download(0))).reason == "BLOB_CORRUPT"
        assert (await daemon.run(run)).state == RUNNING
        said = await audited(daemon, "version.corrupt")
        assert said[0]["version"] == 0 and version_key(run, 0) in said[0]["reason"]
        await download(1)
        await fault(daemon.operator.RollbackRun(op.RollbackRunRequest(run=run, version=0)))
        await alice.push((await alice.task(run)).ticket, filled(0.5))
        await daemon.until(run, lambda found: found.version == 2)
