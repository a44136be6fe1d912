"""Copying a server's data while it works.

The database is copied first, at one moment; then the files that this copy names. Versions and states never change, and
stay where they are unless their run is deleted, or the retention removes them. Updates go once their round is
committed, so each whole one in the spool is pinned by a second name before the database is copied, and again after it:
whatever the copy names was there at one of these two moments, unless it came and went in between. A run that relays a
parent's has a sum besides, which goes once the parent's next version is supplied. Where a run was deleted meanwhile,
versions were removed, or a sum went, something is missing, and the database is copied again, which does not name it any
more.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft import __version__
from fedpeft.errors import DiskFull, FedpeftError, StateInvalid
from fedpeft.process import durable
from fedpeft_server.backups import folders
from fedpeft_server.backups.manifest import Copied, Manifest
from fedpeft_server.checks import database as checked_database
from fedpeft_server.checks.findings import Report
from fedpeft_server.settings import Settings
from fedpeft_server.store import DATABASE_FILE
from fedpeft_server.store.blobs.blobs import CHUNK_BYTES, Blobs
from fedpeft_server.store.connection import sqlite_file
from fedpeft_server.store.database import Database
from fedpeft_server.store.queries import whole
from fedpeft_server.store.store import sum_files, version_files
from fedpeft_server.store.update_store import update_key

ATTEMPTS = 5
"""Most copies of the database, where files that one names are gone before they are copied."""
_KEYS = ("identity", "operator")
"""Folders of keys and certificates in a data folder."""


@dataclass(frozen=True, slots=True)
class Named:
    """A file that the database names.

    Attributes:
        path: Its path in the backup.
        sha256: Its digest, hexadecimal.
        sources: Places to copy it from: a file, or a store of blobs with a key.
    """

    path: str
    sha256: str
    sources: tuple[Path | tuple[Blobs, str], ...]


@dataclass
class Backup:
    """One backup under way.

    Args:
        settings: Of the server.
        made: The folder in which it is made.
        pins: An empty folder on the file system of the spool.

    Attributes:
        files: Copied files, by path in the backup.
    """

    settings: Settings
    made: Path
    pins: Path
    files: dict[str, Copied] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given, folder = self.settings, self.settings.data_dir
        blobs = Blobs(given.blobs or str(folder / "blobs"), flag="--blobs" if given.blobs else "--data-dir")
        self._blobs = blobs if blobs.is_folder else None
        self._bucket = Blobs(given.updates, flag="--updates") if given.updates else None
        self._database = sqlite_file(given.database_url)
        self._elsewhere = [] if blobs.is_folder else [given.blobs]
        if self._database is None:
            self._elsewhere.append(given.database)

    def make(self) -> Manifest:
        """Copies everything; returns the manifest, which is not written yet.

        Raises:
            StateInvalid: If the database cannot be copied or read.
            DiskFull: If there is no room.
        """
        missing: set[str] = set()
        for _ in range(ATTEMPTS):
            now = time.time()
            named = self._snapshot()
            before, missing = missing, {each.path for each in named if not self._copy(each)}
            if missing <= before:  # copied again, it still names them: they are lost
                break
        self._drop({each.path for each in named})
        self._copy_keys()
        if self._database is not None:
            self._note(DATABASE_FILE)
        return Manifest(
            now,
            __version__,
            self.files,
            [checked_database.without_password(place) for place in self._elsewhere],
            sorted(missing),
        )

    def _snapshot(self) -> list[Named]:
        """Copies the database, and pins updates before and after; returns what the copy names."""
        self._pin()
        url, report = self.settings.database_url, Report()
        if self._database is not None:
            _copy_sqlite(self._database, self.made / DATABASE_FILE)
            url = f"sqlite:///{self.made / DATABASE_FILE}"
        self._pin()
        with checked_database.opened(url, report) as database:
            if database is None:
                raise StateInvalid(f"the database cannot be copied: {report.findings[-1].line}")
            return list(self._named(database))

    def _pin(self) -> None:
        """Gives each whole update in the spool a second name, so that it stays when its round is over."""
        with suppress(FileNotFoundError):
            for path in (self.settings.data_dir / "spool").iterdir():
                if path.suffix in (".update", ".manifest") and not (self.pins / path.name).exists():
                    with suppress(FileNotFoundError):  # its round is over
                        _link(path, self.pins / path.name)

    def _named(self, database: Database) -> Iterator[Named]:
        with database.transactions.read() as connection:
            for run in whole.select_runs(connection):
                versions = [version for version in whole.select_versions(connection, run) if version.has_files]
                files = [each for version in versions for each in version_files(version)]
                files += sum_files(run, whole.select_sums(connection, run))
                if self._blobs is not None:
                    yield from (Named(f"blobs/{key}", sha256, ((self._blobs, key),)) for _, key, sha256 in files)
            wanted = {ticket: sha256 for _, _, ticket, sha256 in whole.select_wanted(connection)}
        for ticket, sha256 in wanted.items():
            name = f"{ticket}.{sha256}.update"
            bucket = ((self._bucket, update_key(ticket, sha256)),) if self._bucket is not None else ()
            yield Named(f"spool/{name}", sha256, (self.pins / name, *bucket))
        for manifest in sorted(self.pins.glob("*.manifest")):  # of updates that are kept for good, and open rounds
            kept = manifest.with_suffix(".update")
            if kept.exists():
                yield Named(f"spool/{manifest.name}", "", (manifest,))
                if kept.name.split(".")[0] not in wanted:
                    yield Named(f"spool/{kept.name}", kept.name.split(".")[1], (kept,))

    def _copy(self, named: Named) -> bool:
        """Copies a file, unless it is copied; returns False if no source has it as it should be."""
        if named.path in self.files:
            return True
        target = self.made / named.path
        target.parent.mkdir(parents=True, exist_ok=True)
        for source in named.sources:
            try:
                with durable.refusals(f"copying {named.path}"):
                    found = _copied(source, target)
            except DiskFull:
                raise
            except FedpeftError:
                continue
            if named.sha256 in ("", found.sha256):
                self.files[named.path] = found
                return True
        target.unlink(missing_ok=True)
        return False

    def _drop(self, named: set[str]) -> None:
        """Removes what an earlier copy of the database named, and the last one does not."""
        for path in [path for path in self.files if path not in named]:
            (self.made / path).unlink()
            del self.files[path]

    def _copy_keys(self) -> None:
        places = {name: self.settings.data_dir / name for name in _KEYS} | {"identity": self.settings.certificates}
        for name, folder in places.items():
            if folder.is_dir():
                target = self.made / name
                target.mkdir(mode=0o700)
                for source in sorted(path for path in folder.iterdir() if path.is_file()):
                    shutil.copy2(source, target / source.name)
                    self._note(f"{name}/{source.name}")

    def _note(self, path: str) -> None:
        file = self.made / path
        self.files[path] = Copied(durable.sha256(file).hex(), file.stat().st_size)


def back_up(settings: Settings, to: Path) -> Manifest:
    """Copies a server's data into a new folder, which appears once it is whole.

    Args:
        settings: Of the server, which may be at work.
        to: The folder; must not be there, or be empty.

    Raises:
        StateInvalid: If it is there, its place will not do, or something cannot be read.
        DiskFull: If there is no room.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StateInvalid(f"--to {to} is there already; name a new folder for each backup")
    if not settings.data_dir.is_dir():
        raise StateInvalid(f"--data-dir {settings.data_dir}: there is no such folder")
    folders.check_new("--to", to, settings.data_dir)
    with (
        durable.refusals(f"making the backup {to}"),
        durable.scratch(settings.data_dir / "backup") as pins,
        durable.folder(to) as made,
    ):
        made.chmod(0o700)
        manifest = Backup(settings, made, pins).make()
        manifest.write(made)
    return manifest


def _copy_sqlite(source: Path, target: Path) -> None:
    """Copies a SQLite database that may be in use, as it is at one moment; no writer waits for that.

    Raises:
        StateInvalid: If it is not there, or cannot be read.
    """
    target.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as reading,
            closing(sqlite3.connect(target)) as writing,
        ):
            reading.backup(writing)
    except sqlite3.Error as error:
        raise StateInvalid(f"the database {source} cannot be copied: {error}; see `fedpeft-server check`") from None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except PermissionError:  # a file system without second names
        shutil.copyfile(source, target)


def _copied(source: Path | tuple[Blobs, str], target: Path) -> Copied:
    """Copies a file or a blob and returns what was copied."""
    digest, size_bytes = hashlib.sha256(), 0
    with target.open("wb") as file:
        for piece in _pieces(source) if isinstance(source, Path) else source[0].pieces(source[1]):
            file.write(piece)
            digest.update(piece)
            size_bytes += len(piece)
    return Copied(digest.hexdigest(), size_bytes)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece
