"""The updates under a check: each one that is received and not folded, and those that are kept."""

from __future__ import annotations

from pathlib import Path

from fedpeft.errors import BlobCorrupt, FedpeftError
from fedpeft.process import durable
from fedpeft_server.checks.findings import READABLE, STRAY, Report
from fedpeft_server.store import spool
from fedpeft_server.store.blobs import integrity
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.database import Database
from fedpeft_server.store.queries import whole
from fedpeft_server.store.update_store import update_key

LOST = "`run verify` needs it: restore it from a backup"
ASKED = "none is needed: its client is asked for it again"


def check_updates(database: Database, folder: Path, bucket: Blobs | None, keep: bool, report: Report) -> None:
    """Checks updates in a spool, and in an object store if there is one.

    Args:
        database: The database that knows their tickets.
        folder: The spool.
        bucket: The object store; None if there is none.
        keep: True if updates are kept after their round.
        report: Told of what is found.
    """
    with database.transactions.read() as connection:
        wanted = list(whole.select_wanted(connection))
        tickets = whole.select_tickets(connection)
    damaged = _check_spool(folder, tickets, {ticket for _, _, ticket, _ in wanted}, report)
    for run, client, ticket, sha256 in wanted:
        report.looked_at["update"] += 1
        name = f"{ticket}.{sha256}.update"
        what = f"update of {client} for {run} ({folder / name})"
        here = (folder / name).is_file() and name not in damaged
        try:
            there = bucket is not None and _is_whole(bucket, ticket, sha256)
        except FedpeftError as error:
            report.fault(update_key(ticket, sha256), error.message, READABLE)
            continue
        if not here and not there:
            found = damaged.get(name, "it is missing")
            report.fault(what, f"it is received, and not folded yet; {found}", ASKED)
        elif bucket is not None and not there:
            report.fault(update_key(ticket, sha256), "it is missing or corrupt in the object store", ASKED)
        elif name in damaged:
            report.note(what, damaged[name], "none is needed: the object store has it whole")
    if bucket is not None:
        _check_others(bucket, tickets, {update_key(ticket, sha256) for _, _, ticket, sha256 in wanted}, keep, report)


def _check_others(bucket: Blobs, tickets: set[str], wanted: set[str], keep: bool, report: Report) -> None:
    """Checks the updates in an object store that no round in progress wants."""
    for key in sorted(set(bucket.keys("updates")) - wanted):
        ticket, _, sha256 = key.removeprefix("updates/").partition("/")
        if ticket not in tickets:
            report.note(key, "the database does not know it", STRAY)
        elif not keep:
            report.note(key, "its round is over, and updates are not kept", "remove it")
        elif (found := bucket.digest(key)) != sha256:
            report.fault(key, f"this kept update has sha256 {found}", LOST)


def _check_spool(folder: Path, tickets: set[str], wanted: set[str], report: Report) -> dict[str, str]:
    """Reads every whole update in the spool; returns what is the matter with those of `wanted` tickets, by file."""
    damaged: dict[str, str] = {}
    if not folder.is_dir():
        return damaged
    for path in sorted(folder.iterdir()):
        name = spool.FILE.fullmatch(path.name)
        if name is None:
            _note_other(path, report)
        elif name["ticket"] not in tickets:
            report.note(str(path), "the database knows no such ticket", STRAY)
        elif name["kind"] == "update":
            fault = _fault(path, name["digest"])
            if fault and name["ticket"] in wanted:
                damaged[path.name] = fault
            elif fault:
                report.fault(str(path), f"this kept update {fault}", LOST)
    return damaged


def _note_other(path: Path, report: Report) -> None:
    if path.suffix == f".{integrity.SUFFIX}":
        report.note(str(path), "it was set aside because it is corrupt", "remove it once nobody wants to look at it")
    elif path.suffix != ".manifest" or not path.with_suffix(".update").exists():
        report.note(str(path), "the server does not know it", "look where it comes from, or remove it")


def _fault(path: Path, sha256: str) -> str:
    try:
        found = durable.sha256(path).hex()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "" if found == sha256 else f"has sha256 {found}"


def _is_whole(bucket: Blobs, ticket: str, sha256: str) -> bool:
    try:
        return bucket.digest(update_key(ticket, sha256)) == sha256
    except BlobCorrupt:
        return False
