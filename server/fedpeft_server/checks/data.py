"""The check of a server's data as a whole, in the order in which things depend on each other. It changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from fedpeft.errors import AuditBroken, FedpeftError, SettingsInvalid, StateInvalid, StoreUnavailable
from fedpeft.identity import audit
from fedpeft.identity.audit import AuditEntry
from fedpeft.process.mounts import tree_bytes
from fedpeft_server.checks.database import opened
from fedpeft_server.checks.findings import STRAY, FolderUse, Report
from fedpeft_server.checks.runs import check_run
from fedpeft_server.checks.updates import check_updates
from fedpeft_server.settings import Settings
from fedpeft_server.startup_checks import refuse_lost_certificates
from fedpeft_server.store import DATABASE_FILE
from fedpeft_server.store.blobs import integrity
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.connection import NOTE
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import RunRow

PAGE = 1000
"""Entries of the audit log that are read at once."""
PLACES = (
    "blobs",
    "spool",
    "outbound",
    "cache",
    "fetched",
    "scratch",
    "identity",
    "operator",
    "lock",
    "backup.json",
    NOTE,
)
"""Names that belong into a data folder, beside the files of the database."""


def check(settings: Settings) -> Report:
    """Checks all that the settings of a server name.

    Raises:
        StateInvalid: If a place of blobs or updates is none, or cannot be used now.
    """
    report, folder = Report(), settings.data_dir
    blobs = Blobs(settings.blobs or str(folder / "blobs"), flag="--blobs" if settings.blobs else "--data-dir")
    bucket = Blobs(settings.updates, flag="--updates") if settings.updates else None
    for place in (blobs, bucket):
        if place is not None:
            _refuse_away(place)
    report.disks += _uses(folder, *(place.folder for place in (blobs, bucket) if place is not None))
    with opened(settings.database_url, report) as database:
        if database is None:
            return report
        _check_audit(database, report)
        _check_certificates(database, settings, report)
        keys: set[str] = set()
        for run in _runs(database, report):
            keys |= check_run(run, database, blobs, report)
        check_updates(database, folder / "spool", bucket, settings.keep_updates, report)
    for key in sorted(set(blobs.keys("runs")) - keys):
        report.note(key, "the database does not know it", STRAY)
    for place in (blobs, bucket):
        if place is not None:
            _note_set_aside(place, report)
    _note_unknown(folder, report)
    return report


def _uses(data: Path, *others: Path | None) -> Iterator[FolderUse]:
    for folder in (data, *(other for other in others if other is not None and data.absolute() not in other.parents)):
        usage = shutil.disk_usage(folder)
        yield FolderUse(str(folder), tree_bytes(folder), usage.free, usage.total)


def _refuse_away(place: Blobs) -> None:
    """Refuses to check a place that does not answer: each of thousands of files would wait for it anew."""
    try:
        place.has_any("runs")
    except StoreUnavailable as error:
        raise StateInvalid(error.message) from None


def _runs(database: Database, report: Report) -> Iterator[RunRow]:
    try:
        yield from database.runs()
    except (FedpeftError, ValueError) as error:
        report.fault("runs", f"their rows cannot be read: {error}", "restore the database from a backup")


def _check_audit(database: Database, report: Report) -> None:
    def entries() -> Iterator[AuditEntry]:
        last = 0
        while page := database.transactions.entries_after(last, PAGE):
            report.looked_at["audit entry"] += len(page)
            yield from page
            last = page[-1].number

    try:
        audit.verify(entries())
    except AuditBroken as error:
        report.fault("audit log", error.message, "restore the database from a backup, and find out who changed it")


def _check_certificates(database: Database, settings: Settings, report: Report) -> None:
    if not (settings.certificates / "server.pem").exists():
        try:
            refuse_lost_certificates(database, settings.certificates)
        except SettingsInvalid as error:
            found, _, cure = error.message.partition("; ")
            report.fault(str(settings.certificates), found, cure)


def _note_set_aside(blobs: Blobs, report: Report) -> None:
    for key in sorted(blobs.keys(integrity.SUFFIX)):
        report.note(key, "it was set aside because it is corrupt", "remove it once nobody wants to look at it")


def _note_unknown(folder: Path, report: Report) -> None:
    for path in sorted(folder.iterdir()):
        if path.name not in PLACES and not path.name.startswith(DATABASE_FILE):
            report.note(str(path), "the server does not know it", "look where it comes from, or remove it")
