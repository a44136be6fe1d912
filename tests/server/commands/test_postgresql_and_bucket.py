"""`check`, `backup` and `restore` of a server whose database is a PostgreSQL and whose places are buckets."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import obstore
import pytest
from obstore.store import from_url
from sqlalchemy import create_engine, make_url, text

from fedpeft.errors import StateInvalid
from fedpeft.rounds.state_machine import ticket_id
from fedpeft_server.backups import manifest
from fedpeft_server.commands import check
from fedpeft_server.store.blobs.blobs import PLACE_KEY
from fedpeft_server.store.connection import sqlite_file
from fedpeft_server.store.migrations import scripts
from fedpeft_server.store.store import state_prefix, version_key, version_prefix

from ...ports import free_port
from ..conftest import StartDaemon, config, filled
from ..runs.test_rollback import hold
from .test_backup import back_up, go_on, put_back
from .test_check import checked, midway


def libpq(url: str) -> str:
    """Returns a URL as PostgreSQL's own programs take it."""
    return url.replace("postgresql+psycopg://", "postgresql://")


def dump(url: str, to: Path) -> None:
    command = ["pg_dump", "--format", "custom", "--file", str(to), libpq(url)]
    subprocess.run(command, check=True, timeout=60)


def load(source: Path, url: str) -> None:
    subprocess.run(["pg_restore", "--dbname", libpq(url), str(source)], check=True, timeout=60)


@dataclass
class Places:
    """The places of a server, and what lies there."""

    folder: Path
    database: str
    bucket: str

    @property
    def settings(self) -> dict[str, str]:
        return {"database": self.database, "blobs": f"{self.bucket}/versions", "updates": f"{self.bucket}/updates"}

    @property
    def flags(self) -> list[str]:
        return [word for name, value in self.settings.items() for word in (f"--{name}", value)]

    @property
    def store(self) -> obstore.store.ObjectStore:
        return from_url(self.bucket)

    def objects(self) -> list[str]:
        """The keys of all that lies there but the marks of the places."""
        keys = (str(found["path"]) for batch in obstore.list(self.store) for found in batch)
        return sorted(key for key in keys if not key.endswith(f"/{PLACE_KEY}"))

    def update(self, run: str) -> str:
        """The key of the update that alice has sent for the round in progress."""
        (key,) = [key for key in self.objects() if ticket_id(run, 2, "alice") in key]
        return key

    def file(self, beginning: str) -> str:
        """The key of the one file of a version, or of its state."""
        (key,) = [key for key in self.objects() if key.startswith(f"versions/{beginning}")]
        return key

    def damage(self, key: str) -> None:
        data = bytearray(obstore.get(self.store, key).bytes())
        data[-3] ^= 0x10
        obstore.put(self.store, key, bytes(data))

    def execute(self, statement: str) -> None:
        engine = create_engine(self.database)
        with engine.begin() as connection:
            assert connection.execute(text(statement)).rowcount > 0
        engine.dispose()

    def tables(self) -> bytes:
        """All that the database holds."""
        command = ["pg_dump", "--data-only", "--inserts", libpq(self.database)]
        lines = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout.splitlines()
        return b"\n".join(line for line in lines if not line.startswith((b"\\restrict", b"\\unrestrict")))


@pytest.fixture
def places(tmp_path: Path, migrated_postgresql_url: str, s3: str) -> Places:
    return Places(tmp_path / "data", migrated_postgresql_url, s3)


@pytest.fixture
async def run(start: StartDaemon, places: Places) -> str:
    """A run in its second round, whose server was stopped."""
    daemon = await start(places.folder, **places.settings)
    run = await midway(daemon)
    await daemon.end()
    return run


async def test_sound_data_have_no_finding_and_stay_as_they_are(
    places: Places, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = places.tables(), places.objects()
    assert checked(capsys, places.folder, *places.flags) == (0, [])
    assert check.main(["--data-dir", str(places.folder), *places.flags]) == 0
    assert "checked 1 run, 2 versions, 1 state, 1 update, 1 record, " in capsys.readouterr().out
    assert (places.tables(), places.objects()) == before
    assert [key for key in places.objects() if run in key and "versions/runs" in key] == [
        places.file(beginning) for beginning in (state_prefix(run, 1), version_prefix(run, 0), version_prefix(run, 1))
    ]


def number_of(key: str) -> int:
    """Returns the number of the version that a key is of."""
    return int(key.rpartition("/versions/")[2][:6])


Break = Callable[[Places, str], object]
FAULTS: dict[str, tuple[Break, str, str, str]] = {
    "a version that is missing": (
        lambda p, run: obstore.delete(p.store, f"versions/{version_key(run, 0)}"),
        "versions/000000",
        "this version is missing",
        "restore it from a backup",
    ),
    "a version that rots": (
        lambda p, run: p.damage(p.file(version_prefix(run, 1))),
        "versions/000001",
        "this version has sha256",
        "or roll the run back",
    ),
    "a state that rots": (
        lambda p, run: p.damage(p.file(state_prefix(run, 1))),
        "state/000001",
        "this state has sha256",
        "or roll the run back",
    ),
    "an update that rots in the bucket": (
        lambda p, run: p.damage(p.update(run)),
        "updates/",
        "it is missing or corrupt in the object store",
        "its client is asked for it again",
    ),
    "a row of a version": (
        lambda p, run: p.execute("DELETE FROM versions WHERE version = 0"),
        "version 0",
        "the database has no row of it",
        "restore the database",
    ),
    "a record": (
        lambda p, run: p.execute("UPDATE rounds SET record = replace(record, 'alice', 'mallory') WHERE number = 1"),
        "records of",
        "round 1: the record has sha256",
        "restore the database",
    ),
    "the audit log": (
        lambda p, run: p.execute("UPDATE audit SET actor = 'nobody' WHERE number = 3"),
        "audit log",
        "entry 3",
        "find out who changed it",
    ),
    "a newer schema": (
        lambda p, run: p.execute("UPDATE alembic_version SET version_num = '9999'"),
        "database",
        "its schema 9999 is newer than",
        "check it with the newer release",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_named_with_what_to_do(
    places: Places, run: str, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    break_it, what, found, cure = FAULTS[name]
    break_it(places, run)
    code, findings = checked(capsys, places.folder, *places.flags)
    faults = [(f[1], f[2], f[3]) for f in findings if f[0] == "fault"]
    assert code == 1 and len(faults) == 1, findings
    assert what in faults[0][0] and found in faults[0][1] and cure in faults[0][2]


async def test_what_is_no_fault(places: Places, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    obstore.put(places.store, "versions/runs/run-000000000000/versions/000000.safetensors", b"of another database")
    for path in (places.folder / "spool").glob("*.update"):
        path.unlink()
    code, findings = checked(capsys, places.folder, *places.flags)
    assert [(level, found) for level, _, found, _ in findings] == [("note", "the database does not know it")]
    assert code == 0, "the bucket has the update"
    obstore.delete(places.store, places.update(run))
    code, findings = checked(capsys, places.folder, *places.flags)
    assert code == 1 and any("alice" in what and "it is missing" in found for _, what, found, _ in findings)


async def test_an_older_schema_is_named_and_not_migrated(
    places: Places, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = scripts().get_revision("head")
    older = newest.down_revision
    places.execute(f"UPDATE alembic_version SET version_num = '{older}'")
    code, findings = checked(capsys, places.folder, *places.flags)
    assert [(level, found) for level, _, found, _ in findings] == [
        ("note", f"its schema {older} is older than {newest.revision}"),
        ("fault", "what is in it was not checked"),
    ]
    assert code == 1
    places.execute(f"UPDATE alembic_version SET version_num = '{older}' WHERE version_num = '{older}'")


async def test_a_database_that_is_away_is_a_fault(
    places: Places, run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = make_url(places.database).update_query_dict({"host": str(tmp_path)})
    url = away.set(password="secret").render_as_string(hide_password=False)
    code, findings = checked(capsys, places.folder, *places.flags, "--database", url)
    ((level, what, found, cure),) = findings
    assert (code, level, what) == (1, "fault", "database") and "cannot be reached" in found and cure
    assert "secret" not in found


async def test_a_bucket_that_is_away_ends_the_check(
    places: Places, run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StateInvalid, match=r"^looking for blob runs in --blobs s3://.* is not reached \(.*"):
        check.main(["--data-dir", str(places.folder), *places.flags])


@pytest.mark.timed(removal_delay_s=0.02)
async def test_a_dump_that_names_versions_which_were_removed_since_goes_on(
    start: StartDaemon,
    places: Places,
    tmp_path: Path,
    postgresql_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    daemon = await start(places.folder, keep_versions=2, **places.settings)
    run = (await daemon.create(config(rounds={"count": 5, "clients": 1}))).id
    clients = await daemon.clients("a")

    async def settled(*wanted: int) -> None:
        async with asyncio.timeout(20):
            while [number_of(key) for key in await asyncio.to_thread(places.objects)] != list(wanted):
                await asyncio.sleep(0.05)

    for number in (1, 2, 3):
        await hold(daemon, run, number, clients, 0.1)
    await settled(0, 2, 3)
    await asyncio.to_thread(dump, places.database, tmp_path / "dump")
    await hold(daemon, run, 4, clients, 0.1)
    await settled(0, 3, 4)
    await daemon.end()

    load(tmp_path / "dump", postgresql_url)
    back = Places(tmp_path / "back", postgresql_url, places.bucket)
    back.folder.mkdir()
    code, findings = checked(capsys, back.folder, *back.flags)
    assert code == 1 and [(level, number_of(what), found) for level, what, found, _ in findings] == [
        ("fault", 2, "this version is missing"),
        ("note", 4, "the database does not know it"),
    ]
    daemon = await start(back.folder, keep_versions=2, **back.settings)
    for number in (4, 5):
        await hold(daemon, run, number, await daemon.clients("a"), 0.1)
    await settled(0, 4, 5)
    await daemon.end()
    assert checked(capsys, back.folder, *back.flags) == (0, [])


async def test_a_backup_with_a_dump_ends_with_the_same_bits(
    start: StartDaemon,
    places: Places,
    tmp_path: Path,
    postgresql_url: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As docs/deploy.md says: the dump, the backup, and later both put back; the buckets are those there are."""
    one = await start(places.folder, **places.settings)
    two = await start(tmp_path / "second", **places.settings)
    run = await midway(one)
    await asyncio.to_thread(dump, places.database, tmp_path / "dump")
    assert await asyncio.to_thread(back_up, tmp_path / "second", tmp_path / "copy", *places.flags) == 0
    said = capsys.readouterr().err
    assert said.count("copy that by its own means, a database before the backup, a bucket after it") == 2
    made = manifest.read(tmp_path / "copy")
    assert [unquote(place) for place in made.elsewhere] == [places.settings["blobs"], places.database]
    assert made.lacks == []
    assert [path for path in made.files if path.startswith("spool/")], "alice's update came to the other daemon"
    wanted = await go_on(two, run)
    await one.end()
    await two.end()
    assert not [key for key in places.objects() if key.startswith("updates/")], "they are folded, and gone"

    capsys.readouterr()
    assert put_back(tmp_path / "copy", tmp_path / "back", "--database", postgresql_url) == 0
    assert capsys.readouterr().err.count("restore that by its own means, then run fedpeft-server check") == 2
    load(tmp_path / "dump", postgresql_url)
    back = Places(tmp_path / "back", postgresql_url, places.bucket)
    code, findings = checked(capsys, back.folder, *back.flags)
    assert code == 1, "the update is in the spool alone, and three versions were made since"
    assert {(level, found) for level, _, found, _ in findings} == {
        ("fault", "it is missing or corrupt in the object store"),
        ("note", "the database does not know it"),
    }
    daemon = await start(back.folder, **back.settings)
    assert (await daemon.run(run)).version == 1
    (bob,) = await daemon.clients("bob")
    await bob.push((await bob.task(run)).ticket, filled(0.5))
    await daemon.until(run, lambda found: found.version == 2)  # alice's update was in the backup
    assert await go_on(daemon, run) == wanted
    await daemon.end()
    assert checked(capsys, back.folder, *back.flags) == (0, [])


def test_a_url_of_postgresql_is_no_file(migrated_postgresql_url: str) -> None:
    assert sqlite_file(migrated_postgresql_url) is None
