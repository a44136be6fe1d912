"""SQL about runs, their versions and evaluations; each function is a part of the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, select, update

from fedpeft.errors import MetricsInvalid, RunNotFound, VersionNotFound
from fedpeft.rounds.transitions import Changes
from fedpeft_server.store import stored, tables
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import RevisionMoved, RunRow, RunState, VersionRow

MAX_SPLITS = 16
"""Most splits of a run, over all its evaluators: each has its own series in Prometheus and figures of every version."""


_STATES = select(tables.runs.c.id, tables.runs.c.state).where(tables.runs.c.id.in_(bindparam("ids", expanding=True)))
_VERSION = select(tables.versions).where(
    tables.versions.c.run == bindparam("of_run"), tables.versions.c.version == bindparam("of_version")
)
_MOVE = (
    update(tables.runs)
    .where(tables.runs.c.id == bindparam("of_run"), tables.runs.c.revision == bindparam("at"))
    .values({name: bindparam(f"to_{name}") for name in ("revision", "state", "reason", "version")})
)
_REVISION = select(tables.runs.c.revision).where(tables.runs.c.id == bindparam("of_run"))


def insert_run(connection: Connection, run: RunRow) -> None:
    """Inserts a run."""
    connection.execute(
        insert(tables.runs).values(
            id=run.id,
            config=stored.dump_config(run.config),
            spec=stored.dump_spec(run.spec),
            backbone_fingerprint=run.backbone_fingerprint,
            state=str(run.state),
            reason=run.reason,
            version=run.version,
            created_at=run.created_at,
            model_parameters=run.model_parameters,
            request_id=run.request_id or None,
            request_digest=run.request_digest,
            revision=run.revision,
            relay=run.relay,
        )
    )


def select_run(connection: Connection, run: str) -> RunRow:
    """Returns a run by id.

    Raises:
        RunNotFound: If there is none.
    """
    row = connection.execute(select(tables.runs).where(tables.runs.c.id == run)).one_or_none()
    if row is None:
        raise RunNotFound(f"there is no run {run}")
    return _run(row)


def select_run_by_request(connection: Connection, request_id: str) -> RunRow | None:
    """Returns the run that a CreateRun call made."""
    row = connection.execute(select(tables.runs).where(tables.runs.c.request_id == request_id)).one_or_none()
    return None if row is None else _run(row)


def select_runs(connection: Connection) -> list[RunRow]:
    """Returns all runs, oldest first."""
    rows = connection.execute(select(tables.runs).order_by(tables.runs.c.created_at, tables.runs.c.id))
    return [_run(row) for row in rows]


def move(connection: Connection, changes: Changes) -> None:
    """Takes a run to its next revision: its state, the reason and its newest version.

    Raises:
        RunNotFound: If there is none.
        RevisionMoved: If the run is not at the revision that the changes begin at.
    """
    run, after = changes.round.run, changes.after
    values = {"of_run": run, "at": changes.before.revision, "to_revision": after.revision}
    values |= {"to_state": str(after.state), "to_reason": after.reason, "to_version": after.version}
    if connection.execute(_MOVE, values).rowcount == 0:
        at = select_revision(connection, run)
        raise RevisionMoved(f"{run} is at revision {at}, not at {changes.before.revision}")


def select_revisions(connection: Connection, states: Iterable[RunState] | None) -> dict[str, int]:
    """Returns the revisions of the runs in some states, or of all."""
    query = select(tables.runs.c.id, tables.runs.c.revision)
    if states is not None:
        query = query.where(tables.runs.c.state.in_([str(state) for state in states]))
    return {row.id: int(row.revision) for row in connection.execute(query)}


def select_revision(connection: Connection, run: str) -> int:
    """Returns the revision of a run.

    Raises:
        RunNotFound: If there is none.
    """
    revision = connection.execute(_REVISION, {"of_run": run}).scalar()
    if revision is None:
        raise RunNotFound(f"there is no run {run}")
    return int(revision)


def delete_run(connection: Connection, run: str) -> None:
    """Deletes a run with everything that points to it.

    Raises:
        RunNotFound: If there is none.
    """
    if connection.execute(delete(tables.runs).where(tables.runs.c.id == run)).rowcount == 0:
        raise RunNotFound(f"there is no run {run}")


def select_states(connection: Connection, runs: Iterable[str]) -> dict[str, RunState]:
    """Returns the states of those of some run ids that exist."""
    rows = connection.execute(_STATES, {"ids": sorted(set(runs))})
    return {row.id: RunState(row.state) for row in rows}


def existing(connection: Connection, runs: Iterable[str]) -> set[str]:
    """Returns those of some run ids that exist."""
    return set(select_states(connection, runs))


def insert_version(connection: Connection, version: VersionRow) -> None:
    """Inserts a version."""
    connection.execute(insert(tables.versions).values(asdict(version)))


def select_version(connection: Connection, run: str, version: int) -> VersionRow:
    """Returns a version of a run.

    Raises:
        RunNotFound: If there is no such run.
        VersionNotFound: If there is none.
    """
    row = connection.execute(_VERSION, {"of_run": run, "of_version": version}).one_or_none()
    if row is None:
        if not existing(connection, [run]):
            raise RunNotFound(f"there is no run {run}")
        raise VersionNotFound(f"run {run} has no adapter version {version}")
    return VersionRow.of(row._asdict())


def put_evaluation(
    connection: Connection, run: str, version: int, evaluator: str, split: str, metrics: Mapping[str, float], at: float
) -> None:
    """Writes what an evaluator found on a split, in place of what it found before.

    Raises:
        MetricsInvalid: If the run has `MAX_SPLITS` others: each is a time series of its own, for ever.
    """
    table = tables.evaluations
    known = select(table.c.split).where(table.c.run == run, table.c.split == split).limit(1)
    if connection.execute(known).first() is None:
        others = list(_splits(connection, run))
        if len(others) >= MAX_SPLITS:
            fault = f"is new, and {run} has {len(others)} splits, the most a run may have: {', '.join(others)}"
            raise MetricsInvalid(f"split {split} {fault}", (("split", fault),))
    row = {"run": run, "version": version, "evaluator": evaluator, "split": split, "metrics": dict(metrics), "at": at}
    upsert(connection, table, [row], replace=("metrics", "at"))


def _splits(connection: Connection, run: str) -> Iterator[str]:
    """Yields the splits of a run, one look into the index each, however many evaluations there are."""
    table = tables.evaluations
    query = select(func.min(table.c.split)).where(table.c.run == run)
    split = connection.execute(query).scalar()
    while split is not None:
        yield split
        split = connection.execute(query.where(table.c.split > split)).scalar()


def select_evaluations(connection: Connection, run: str, first: int, last: int) -> dict[int, list[dict[str, float]]]:
    """Returns the latest figures of each evaluator, in the evaluators' order, for each scored version in a range."""
    table = tables.evaluations
    query = select(table.c.version, table.c.evaluator, table.c.split, table.c.metrics, table.c.at)
    found: dict[int, list[Any]] = {}
    for row in connection.execute(query.where(table.c.run == run, table.c.version.between(first, last))):
        found.setdefault(row.version, []).append(row)
    return {version: _latest(found[version]) for version in sorted(found)}


def select_last_scored(connection: Connection, run: str) -> dict[str, dict[str, float]]:
    """Returns, for each split, the figures that came last."""
    t = tables.evaluations
    newest = select(t.c.metrics).order_by(t.c.at.desc(), t.c.version.desc()).limit(1)
    return {
        split: connection.execute(newest.where(t.c.run == run, t.c.split == split)).scalar_one()
        for split in _splits(connection, run)
    }


def select_initial_evaluations(connection: Connection, runs: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Returns the latest figures of each evaluator, in their order, for version 0 of those runs that have some."""
    t = tables.evaluations
    query = select(t.c.run, t.c.evaluator, t.c.split, t.c.metrics, t.c.at)
    found: dict[str, list[Any]] = {}
    for row in connection.execute(query.where(t.c.run.in_(runs), t.c.version == 0)):
        found.setdefault(row.run, []).append(row)
    return {run: _latest(rows) for run, rows in found.items()}


def _latest(rows: Iterable[Any]) -> list[dict[str, float]]:
    """Returns the figures that came last of each evaluator, in their order, of rows about one version."""
    latest: dict[str, Any] = {}
    for row in rows:
        known = latest.get(row.evaluator)
        if known is None or (known.at, known.split) < (row.at, row.split):
            latest[row.evaluator] = row
    return [latest[name].metrics for name in sorted(latest)]


def select_evaluated(connection: Connection, evaluator: str) -> list[tuple[str, int]]:
    """Returns the runs and versions that an evaluator scored."""
    t = tables.evaluations
    query = select(t.c.run, t.c.version).where(t.c.evaluator == evaluator).distinct()
    return [(row.run, row.version) for row in connection.execute(query)]


def _run(row: Row[Any]) -> RunRow:
    return RunRow(
        id=row.id,
        config=stored.load_config(row.config),
        spec=stored.load_spec(row.spec),
        backbone_fingerprint=row.backbone_fingerprint,
        state=RunState(row.state),
        reason=row.reason,
        version=row.version,
        created_at=row.created_at,
        model_parameters=row.model_parameters,
        request_id=row.request_id or "",
        request_digest=row.request_digest,
        revision=row.revision,
        relay=row.relay,
    )
