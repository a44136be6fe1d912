"""`fedpeft-server check`: what is wrong with a stopped server's data is named, with what to do; nothing is changed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedpeft.errors import SettingsInvalid, StateInvalid, StoreUnavailable
from fedpeft.rounds.state_machine import ticket_id
from fedpeft_server.commands import check
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.store import state_key, version_key

from ..conftest import Daemon, StartDaemon, config, filled

GOLDEN = Path(__file__).parents[2] / "golden" / "data-dir.tar.gz"


@dataclass
class Stopped:
    """The data of a server that was stopped in round 2 of a run, with an update of alice received."""

    folder: Path
    run: str

    @property
    def database(self) -> Path:
        return self.folder / "fedpeft.db"

    def blob(self, version: int, key: Callable[[str, int], str] = version_key) -> Path:
        return self.folder / "blobs" / key(self.run, version)

    def update(self) -> Path:
        (path,) = (self.folder / "spool").glob(f"{ticket_id(self.run, 2, 'alice')}.*.update")
        return path

    def execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.database, isolation_level=None)) as connection:
            assert connection.execute(statement).rowcount > 0

    def files(self) -> dict[str, bytes]:
        paths = (p for p in self.folder.rglob("*") if p.is_file() and p.name not in ("lock", "fedpeft.db-shm"))
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in paths}


async def midway(daemon: Daemon) -> str:
    """Holds a round, and half of the next one; returns the run."""
    rules = config(rounds={"count": 3, "clients": 2, "quorum": 2}, aggregation={"strategy": "fedavgm"})
    run = (await daemon.create(rules)).id
    clients = await daemon.clients("alice", "bob")
    for number in (1, 2):
        tasks = await asyncio.gather(*(client.task(run) for client in clients))
        for client, task in list(zip(clients, tasks, strict=True))[: 2 if number == 1 else 1]:
            await client.push(task.ticket, filled(0.5))
        if number == 1:
            await daemon.until(run, lambda found: found.version == 1)
    return run


@pytest.fixture
async def stopped(start: StartDaemon, tmp_path: Path) -> Stopped:
    daemon = await start(tmp_path / "data")
    run = await midway(daemon)
    await daemon.end()
    return Stopped(tmp_path / "data", run)


def checked(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str
) -> tuple[int, list[tuple[str, str, str, str]]]:
    """Returns the exit code and the findings."""
    capsys.readouterr()
    code = check.main(["--data-dir", str(folder), "--json", *arguments])
    found = json.loads(capsys.readouterr().out)
    return code, [tuple(finding.values()) for finding in found["findings"]]  # type: ignore[misc]


async def test_sound_data_have_no_finding_and_stay_as_they_are(
    stopped: Stopped, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stopped.files()
    capsys.readouterr()
    assert check.main(["--data-dir", str(stopped.folder)]) == 0
    used, line = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{stopped.folder}: \S+ [KM]iB in use, \S+ GiB free of \S+ GiB", used)
    assert line.startswith("checked 1 run, 2 versions, 1 state, 1 update, 1 record, ")
    assert line.endswith(" audit entries: 0 faults, 0 notes")
    assert stopped.files() == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


FAULTS: dict[str, tuple[Callable[[Stopped], object], str, str, str]] = {
    "a version": (
        lambda s: flip(s.blob(1)),
        "runs/.*/versions/000001",
        "this version has sha256 .* is recorded",
        "restore it from a backup, or roll the run back",
    ),
    "version 0": (lambda s: s.blob(0).unlink(), "runs/.*/versions/000000", "is missing", "restore it from a backup$"),
    "a state": (lambda s: flip(s.blob(1, state_key)), "runs/.*/state/000001", "this state has sha256", "or roll"),
    "an update": (lambda s: flip(s.update()), "update of alice for run-", "not folded yet; has sha256", "asked for it"),
    "no update": (
        lambda s: s.update().unlink(),
        "update of alice for run-",
        "it is missing",
        "its client is asked for",
    ),
    "a record": (
        lambda s: s.execute("update rounds set record = replace(record, 'alice', 'malice') where number = 1"),
        "records of run-",
        "round 1: the record has sha256",
        "restore the database",
    ),
    "a row": (
        lambda s: s.execute(f"update versions set sha256 = '{'0' * 64}' where version = 1"),
        "run-.* version 1",
        "its row and its record name other digests",
        "restore the database",
    ),
    "no row": (
        lambda s: s.execute("delete from versions where version = 0"),
        "run-.* version 0",
        "the database has no row of it",
        "restore the database",
    ),
    "the audit log": (
        lambda s: s.execute("update audit set actor = 'nobody' where number = 2"),
        "audit log",
        "entry 2 was changed",
        "restore the database",
    ),
    "no database": (lambda s: s.database.unlink(), "fedpeft.db", "there is no database", "--data-dir"),
    "another file": (
        lambda s: s.database.write_bytes(b"a letter to my aunt" * 1000),
        "database",
        "is corrupt",
        "restore the database from a backup",
    ),
    "a reference": (
        lambda s: s.execute("delete from runs"),
        "database",
        "row .* of .* refers to a row of runs that is not there",
        "restore the database",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_fault_is_named_with_what_to_do(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, what, found, cure = FAULTS[name]
    damage(stopped)
    before = stopped.files()
    code, findings = checked(capsys, stopped.folder)
    assert code == 1

    faults = [finding for finding in findings if finding[0] == "fault"]
    (first, *_) = [f for f in faults if all(map(re.search, (what, found, cure), f[1:]))] or [None]
    assert first, findings
    assert stopped.files() == before


async def test_what_nobody_knows_is_named_and_is_no_fault(stopped: Stopped, capsys: pytest.CaptureFixture[str]) -> None:
    flip(stopped.update())
    stopped.update().rename(stopped.update().with_name(stopped.update().name + ".1.corrupt"))
    (stopped.folder / "notes.txt").write_text("by hand")
    (stopped.folder / "spool" / "core").write_text("dumped")
    (stopped.folder / "blobs" / "runs" / "run-other").mkdir()
    (stopped.folder / "blobs" / "runs" / "run-other" / "x").write_text("x")
    stopped.execute("update tickets set state = 'late'")
    code, findings = checked(capsys, stopped.folder)
    assert code == 0, findings
    assert {(level, Path(what).name) for level, what, *_ in findings} == {
        ("note", "x"),
        ("note", "notes.txt"),
        ("note", "core"),
        *(("note", path.name) for path in (stopped.folder / "spool").glob("*.corrupt")),
    }


async def test_a_server_that_runs_is_not_checked(start: StartDaemon, tmp_path: Path) -> None:
    await start(tmp_path / "data")
    with pytest.raises(StateInvalid, match=r"in use by another server .*; stop it first, or check a backup of it"):
        check.main(["--data-dir", str(tmp_path / "data")])
    with pytest.raises(StateInvalid, match="there is no such folder"):
        check.main(["--data-dir", str(tmp_path / "nowhere")])
    with pytest.raises(SettingsInvalid, match="data_dir"):
        check.main([])


async def test_updates_and_versions_in_a_bucket(
    start: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"blobs": f"file://{tmp_path}/versions", "updates": f"file://{tmp_path}/updates"}
    daemon = await start(tmp_path / "data", **places)
    run = await midway(daemon)
    await daemon.end()
    stopped = Stopped(tmp_path / "data", run)
    flags = [word for name, url in places.items() for word in (f"--{name}", url)]
    assert checked(capsys, stopped.folder, *flags) == (0, [])
    stopped.update().unlink()
    assert checked(capsys, stopped.folder, *flags) == (0, []), "the bucket has it"
    (copy,) = (p for p in (tmp_path / "updates").rglob("*") if p.is_file())
    with monkeypatch.context() as patch:
        digest = Blobs.digest

        def refusing(blobs: Blobs, key: str) -> str:
            if key.startswith("updates/"):
                raise StoreUnavailable("reading it failed: slow down")
            return digest(blobs, key)

        patch.setattr(Blobs, "digest", refusing)
        code, ((_, _, found, cure),) = checked(capsys, stopped.folder, *flags)
        assert (code, found, cure) == (1, "reading it failed: slow down", "make it readable, and check again")
    flip(copy)
    code, ((_, what, found, _),) = checked(capsys, stopped.folder, *flags)
    assert (code, found) == (1, "it is received, and not folded yet; it is missing") and "alice" in what
    code, findings = checked(capsys, stopped.folder)
    assert code == 1 and any("versions/000001" in what for _, what, *_ in findings), "elsewhere there is none"


@pytest.mark.parametrize("keep", [True, False])
async def test_kept_updates_in_a_bucket_are_read(
    start: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str], keep: bool
) -> None:
    updates = f"file://{tmp_path}/updates"
    daemon = await start(tmp_path / "data", updates=updates, keep_updates=True)
    run = await midway(daemon)
    await daemon.end()
    flags = ["--updates", updates, *(["--keep-updates"] if keep else [])]
    kept = [p for p in (tmp_path / "updates").rglob("*") if p.is_file() and ticket_id(run, 1, "alice") in str(p)]
    assert len(kept) == 1
    code, findings = checked(capsys, tmp_path / "data", *flags)
    said = [(what.rpartition("/")[2], found) for _, what, found, _ in findings if ticket_id(run, 1, "alice") in what]
    left = [(kept[0].name, "its round is over, and updates are not kept")]
    assert (code, said) == (0, [] if keep else left)
    flip(kept[0])
    code, findings = checked(capsys, tmp_path / "data", *flags)
    said = [(found.split()[:3], cure) for _, what, found, cure in findings if ticket_id(run, 1, "alice") in what]
    wrong = [(["this", "kept", "update"], "`run verify` needs it: restore it from a backup")]
    assert (code, said) == ((1, wrong) if keep else (0, [(left[0][1].split()[:3], "remove it")]))


@pytest.mark.parametrize("has_tables", [False, True], ids=["of no bytes", "of another program"])
async def test_a_database_without_a_server_in_it_is_a_fault(
    stopped: Stopped, capsys: pytest.CaptureFixture[str], has_tables: bool
) -> None:
    stopped.database.write_bytes(b"")
    if has_tables:
        with closing(sqlite3.connect(stopped.database)) as other:
            other.execute("CREATE TABLE notes (text)")
    code, findings = checked(capsys, stopped.folder)
    assert (code, [found for *_, found, _ in findings]) == (1, ["the database is empty: nothing of a server is in it"])


async def test_what_is_no_file_in_the_place_of_a_version_is_missing(
    stopped: Stopped, capsys: pytest.CaptureFixture[str]
) -> None:
    version = stopped.blob(1)
    version.unlink()
    os.mkfifo(version)
    code, findings = checked(capsys, stopped.folder)
    assert code == 1 and ("this version is missing" in [found for *_, found, _ in findings])


def test_the_data_of_an_earlier_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = (path.parent for path in tmp_path.rglob("fedpeft.db"))
    before = (folder / "fedpeft.db").read_bytes()
    code, findings = checked(capsys, folder)
    assert code == 0, findings
    assert findings[0][:2] == ("note", "database") and "is older than" in findings[0][2]
    assert (folder / "fedpeft.db").read_bytes() == before
