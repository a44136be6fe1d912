"""`fedpeft-server backup` while the server works, and `restore`: the copy is of one moment, and whole."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import StateInvalid
from fedpeft_server.backups import copying, manifest, restoring
from fedpeft_server.backups.manifest import NAME
from fedpeft_server.commands import backup, check, restore
from fedpeft_server.store.store import version_key

from ..conftest import Daemon, RawClient, StartDaemon, config, filled
from .test_check import flip, midway


def back_up(data: Path, to: Path, *flags: str) -> int:
    return backup.main(["--data-dir", str(data), "--to", str(to), *flags])


def put_back(source: Path, data: Path, *flags: str) -> int:
    return restore.main(["--from", str(source), "--data-dir", str(data), *flags])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


async def go_on(daemon: Daemon, run: str) -> dict[str, bytes]:
    """Has alice and bob finish a run that `midway` left; returns its last version."""

    async def train(client: RawClient) -> None:
        while True:
            await client.push((await client.task(run)).ticket, filled(0.5))

    training = [asyncio.create_task(train(client)) for client in await daemon.clients("alice", "bob")]
    await daemon.until(run, lambda found: found.version == 3)
    for each in training:
        each.cancel()
    await asyncio.gather(*training, return_exceptions=True)
    return {name: values.tobytes() for name, values in (await daemon.adapter(run, 3)).items()}


async def test_a_copy_of_a_live_server_ends_with_the_same_bits(
    start: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = await start(tmp_path / "data")
    run = await midway(daemon)
    assert await asyncio.to_thread(back_up, tmp_path / "data", tmp_path / "copy") == 0
    assert check.main(["--data-dir", str(tmp_path / "copy")]) == 0, "it is laid out as a data folder"
    assert not [p for p in (tmp_path / "data").iterdir() if p.name.endswith(".new")], "nothing is left behind"
    wanted = await go_on(daemon, run)
    await daemon.end()

    capsys.readouterr()
    assert put_back(tmp_path / "copy", tmp_path / "back") == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("5 files of ") and last.endswith("0 faults, 0 notes")
    daemon = await start(tmp_path / "back")
    (bob,) = await daemon.clients("bob")
    assert (await daemon.run(run)).version == 1
    await bob.push((await bob.task(run)).ticket, filled(0.5))
    await daemon.until(run, lambda found: found.version == 2)
    assert await go_on(daemon, run) == wanted, "alice's update of the open round was in it"


async def test_copies_while_rounds_go_by_are_each_of_one_moment(start: StartDaemon, tmp_path: Path) -> None:
    """Updates come and are folded away all the time; whatever a copied database names is in its copy."""
    daemon = await start(tmp_path / "data")
    run = (await daemon.create(config(rounds={"count": 400, "clients": 2, "quorum": 2}))).id
    clients = await daemon.clients("alice", "bob")
    ended = asyncio.Event()

    async def train() -> None:
        while not ended.is_set():
            tasks = await asyncio.gather(*(client.task(run) for client in clients))
            for client, task in zip(clients, tasks, strict=True):
                await client.push(task.ticket, filled(0.01))

    training = asyncio.create_task(train())
    for number in range(4):
        copy = tmp_path / f"copy-{number}"
        assert await asyncio.to_thread(back_up, tmp_path / "data", copy) == 0
        assert await asyncio.to_thread(check.main, ["--data-dir", str(copy)]) == 0
    ended.set()
    await training
    assert (await daemon.run(run)).version >= 1


async def test_an_update_that_is_folded_away_during_the_copy_is_in_it(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start(tmp_path / "data")
    await midway(daemon)
    copied = copying._copy_sqlite

    def meanwhile(source: Path, target: Path) -> None:
        copied(source, target)
        for path in (tmp_path / "data" / "spool").glob("*.update"):
            path.unlink()

    monkeypatch.setattr(copying, "_copy_sqlite", meanwhile)
    assert await asyncio.to_thread(back_up, tmp_path / "data", tmp_path / "copy") == 0
    assert len(list((tmp_path / "copy" / "spool").iterdir())) == 1


async def test_a_run_that_is_deleted_during_the_copy_is_not_in_it(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start(tmp_path / "data")
    run = await midway(daemon)
    other = (await daemon.create(config(), request_id="other")).id
    await daemon.end()
    copied, times = copying._copy_sqlite, list[Path]()

    def meanwhile(source: Path, target: Path) -> None:
        copied(source, target)
        times.append(target)
        if len(times) == 1:
            with closing(sqlite3.connect(source, isolation_level=None)) as connection:
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute("delete from runs where id = ?", (other,))
            (tmp_path / "data" / "blobs" / version_key(other, 0)).unlink()

    monkeypatch.setattr(copying, "_copy_sqlite", meanwhile)
    assert back_up(tmp_path / "data", tmp_path / "copy") == 0
    assert len(times) == 2
    assert {path.split("/")[2] for path in tree(tmp_path / "copy") if path.startswith("blobs/runs/")} == {run}
    assert check.main(["--data-dir", str(tmp_path / "copy")]) == 0


class TestRefusals:
    @pytest.fixture
    async def copy(self, start: StartDaemon, tmp_path: Path) -> Path:
        daemon = await start(tmp_path / "data")
        await midway(daemon)
        await daemon.end()
        (tmp_path / "data" / "operator").mkdir()
        key = tmp_path / "data" / "operator" / "key.pem"
        key.write_text("secret")
        key.chmod(0o600)
        assert back_up(tmp_path / "data", tmp_path / "copy") == 0
        return tmp_path / "copy"

    async def test_nothing_is_overwritten(self, copy: Path, tmp_path: Path) -> None:
        with pytest.raises(StateInvalid, match="is there already"):
            back_up(tmp_path / "data", copy)
        before = tree(tmp_path / "data")
        with pytest.raises(StateInvalid, match="is not empty, and nothing is overwritten"):
            put_back(copy, tmp_path / "data")
        assert tree(tmp_path / "data") == before
        with pytest.raises(StateInvalid, match="there is no such folder"):
            back_up(tmp_path / "nowhere", tmp_path / "other")

    async def test_of_two_restores_into_one_folder_the_later_one_says_so(
        self, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put, to = restoring._put, tmp_path / "new"

        def then_another(*facts: Any) -> None:
            put(*facts)
            to.mkdir(exist_ok=True)
            (to / "fedpeft.db").touch()

        monkeypatch.setattr(restoring, "_put", then_another)
        with pytest.raises(StateInvalid, match="is not empty, and nothing is overwritten"):
            put_back(copy, to)
        assert [path.name for path in to.iterdir()] == ["fedpeft.db"]

    async def test_keys_stay_their_owners(self, copy: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        assert put_back(copy, tmp_path / "empty") == 0, "an empty folder will do"
        for folder in (copy, tmp_path / "empty"):
            assert folder.stat().st_mode & 0o777 == 0o700
            assert (folder / "operator" / "key.pem").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("damage", ["byte", "end", "file", "manifest", "no manifest", "format"])
    async def test_a_backup_that_is_damaged_is_not_put_back(self, copy: Path, tmp_path: Path, damage: str) -> None:
        (file,) = (copy / "spool").iterdir()
        if damage == "byte":
            flip(file)
        elif damage == "end":
            os.truncate(file, file.stat().st_size - 1)
        elif damage == "file":
            file.unlink()
        elif damage == "manifest":
            os.truncate(copy / NAME, 100)
        elif damage == "no manifest":
            (copy / NAME).unlink()
        else:
            (copy / NAME).write_text(json.dumps(json.loads((copy / NAME).read_text()) | {"format": 2}))
        says = {
            "byte": "is damaged: it has sha256",
            "end": "is damaged: it has sha256",
            "file": "is missing in the backup",
            "manifest": "backup.json is damaged",
            "no manifest": "it is no backup, or one that was interrupted",
            "format": "has format 2; this version reads 1",
        }[damage]
        with pytest.raises(StateInvalid, match=says):
            put_back(copy, tmp_path / "back")
        assert not (tmp_path / "back").exists()
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".new")], "nothing is left of it"


def test_a_place_that_will_not_do_is_refused(tmp_path: Path) -> None:
    data, copy = tmp_path / "data", tmp_path / "copy"
    data.mkdir()
    with pytest.raises(StateInvalid, match=r"^--to .*data/copy is in .*data, and would be lost with it"):
        back_up(data, data / "copy")
    with pytest.raises(StateInvalid, match=r"^--to .*gone/copy: the folder .*gone is not there; make it"):
        back_up(data, tmp_path / "gone" / "copy")
    copy.mkdir()
    manifest.Manifest(0.0, "1", {}).write(copy)
    (tmp_path / "link").symlink_to(copy)
    with pytest.raises(StateInvalid, match=r"^--data-dir .*link/in is in .*copy, and would be lost with it"):
        put_back(copy, tmp_path / "link" / "in")
    assert list(copy.iterdir()) == [copy / NAME] and not list(data.iterdir())


async def test_a_backup_is_not_served(start: StartDaemon, tmp_path: Path) -> None:
    await (await start(tmp_path / "data")).end()
    assert await asyncio.to_thread(back_up, tmp_path / "data", tmp_path / "copy") == 0
    before = tree(tmp_path / "copy")
    with pytest.raises(StateInvalid, match=r"copy is a backup .*`fedpeft-server restore`, and serve that"):
        await start(tmp_path / "copy")
    assert tree(tmp_path / "copy") == before


async def test_an_interrupted_backup_has_not_its_name(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = await start(tmp_path / "data")
    await midway(daemon)
    await daemon.end()

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copying.Backup, "_copy_keys", interrupted)
        back_up(tmp_path / "data", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    (left := tmp_path / ".copy.0123456789abcdef.new").mkdir()  # as one that was killed leaves it
    with pytest.raises(StateInvalid, match="interrupted"):
        put_back(left, tmp_path / "back")
    assert back_up(tmp_path / "data", tmp_path / "copy") == 0
    assert not left.exists(), "the next one removes it"


async def test_what_is_lost_already_is_named(
    start: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon = await start(tmp_path / "data")
    run = await midway(daemon)
    await daemon.end()
    flip(tmp_path / "data" / "blobs" / version_key(run, 0))
    assert back_up(tmp_path / "data", tmp_path / "copy") == 1
    assert f"blobs/{version_key(run, 0)}, which is missing or corrupt already" in capsys.readouterr().err
    assert manifest.read(tmp_path / "copy").lacks == [f"blobs/{version_key(run, 0)}"]
    assert put_back(tmp_path / "copy", tmp_path / "back") == 1
    assert "this version is missing" in capsys.readouterr().out


async def test_a_bucket_is_left_to_its_own_means(
    start: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder in the place of a bucket everything is copied; an object store is named."""
    places = {"blobs": f"file://{tmp_path}/versions", "updates": f"file://{tmp_path}/updates"}
    daemon = await start(tmp_path / "data", **places)
    await midway(daemon)
    flags = [word for name, url in places.items() for word in (f"--{name}", url)]
    (spooled,) = (tmp_path / "data" / "spool").glob("*.update")
    spooled.unlink()
    assert await asyncio.to_thread(back_up, tmp_path / "data", tmp_path / "copy", *flags) == 0
    assert (tmp_path / "copy" / "spool" / spooled.name).exists(), "from the store of updates"
    await daemon.end()
    assert put_back(tmp_path / "copy", tmp_path / "back") == 0
    capsys.readouterr()
    assert back_up(tmp_path / "data", tmp_path / "other", "--blobs", "s3://elsewhere") == 1, "the update is lost here"
    assert "not in it: s3://elsewhere; copy that by its own means" in capsys.readouterr().err
    assert not (tmp_path / "other" / "blobs").exists()
