"""The runs under a check: each version and state that the database names, and the chain of records."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.api.verification import check_records
from fedpeft.errors import BlobCorrupt, FedpeftError
from fedpeft.rounds.policies import policy_of
from fedpeft.rounds.record import Record
from fedpeft_server.checks.findings import READABLE, Report
from fedpeft_server.runs.aggregation import way_back
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.database import Database
from fedpeft_server.store.queries import whole
from fedpeft_server.store.rows import FileState, RunRow, VersionRow
from fedpeft_server.store.store import BlobFile, sum_files, version_files

RESTORE_DATABASE = "restore the database from a backup"
RESTORE = "restore it from a backup"


def check_run(run: RunRow, database: Database, blobs: Blobs, report: Report) -> set[str]:
    """Checks a run; returns the keys of its blobs."""
    report.looked_at["run"] += 1
    with database.transactions.read() as connection:
        versions = whole.select_versions(connection, run.id)
        records = whole.select_records(connection, run.id)
        sums = whole.select_sums(connection, run.id)
    makes_versions = policy_of(run.config.rounds).makes_versions
    chain = {record.round: record for record in _check_records(run, records, report, makes_versions=makes_versions)}
    needed = set(range(run.version + 1)) if makes_versions else {run.version}
    for number in sorted(needed - {version.version for version in versions}):
        report.fault(f"{run.id} version {number}", "the database has no row of it", RESTORE_DATABASE)
    there = [version for version in versions if version.has_files]
    files = [(file, _cure(run, version)) for version in there for file in version_files(version)]
    files += [(file, RESTORE) for file in sum_files(run.id, sums)]
    for version in versions:
        if makes_versions and version.version in chain:
            _compare(version, chain[version.version], report)
        if not version.has_files:
            report.looked_at["removed version"] += 1
    for file, cure in files:
        _check_file(file, cure, blobs, report)
    removing = [version for version in versions if version.retention is FileState.REMOVING]
    return {file.key for file, _ in files} | {file.key for version in removing for file in version_files(version)}


def _check_records(
    run: RunRow, records: Sequence[tuple[int, str, str]], report: Report, *, makes_versions: bool
) -> list[Record]:
    report.looked_at["record"] += len(records)
    try:
        read = [(text, sha256) for _, text, sha256 in records]
        return check_records(run.id, run.version, read, makes_versions=makes_versions)
    except (FedpeftError, ValueError) as error:
        said = error.message if isinstance(error, FedpeftError) else str(error)
        report.fault(f"records of {run.id}", said, RESTORE_DATABASE)
        return []


def _compare(version: VersionRow, record: Record, report: Report) -> None:
    """Compares the digests of a version with those of the record of its round."""
    recorded = record.adapter_sha256, record.state_sha256
    if (version.sha256, version.state_sha256) != recorded:
        name = f"{version.run} version {version.version}"
        report.fault(name, "its row and its record name other digests", RESTORE_DATABASE)


def _cure(run: RunRow, version: VersionRow) -> str:
    return f"{RESTORE}, or {way_back(run)}" if 0 < version.version == run.version else RESTORE


def _check_file(file: BlobFile, cure: str, blobs: Blobs, report: Report) -> None:
    kind, key, sha256 = file
    report.looked_at[kind] += 1
    try:
        found = blobs.digest(key)
    except BlobCorrupt:
        report.fault(key, f"this {kind} is missing", cure)
    except FedpeftError as error:
        report.fault(key, error.message, READABLE)
    else:
        if found != sha256:
            report.fault(key, f"this {kind} has sha256 {found}; {sha256} is recorded", cure)
