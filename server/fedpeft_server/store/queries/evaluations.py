"""SQL about versions that evaluators could not score; each function is a part of the caller's transaction."""

from __future__ import annotations

from sqlalchemy import Connection, delete, select

from fedpeft_server.store import tables
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import FailedEvaluation


def put_failed(connection: Connection, failure: FailedEvaluation) -> None:
    """Writes why a version was not scored, in place of what was written before."""
    row = {
        "evaluator": failure.evaluator,
        "run": failure.run,
        "version": failure.version,
        "reason": failure.reason,
        "at": failure.at,
    }
    upsert(connection, tables.failed_evaluations, [row], replace=("reason", "at"))


def select_failed(connection: Connection, evaluator: str) -> list[tuple[str, int, str]]:
    """Returns run and version of what an evaluator could not score, and why."""
    t = tables.failed_evaluations
    query = select(t.c.run, t.c.version, t.c.reason).where(t.c.evaluator == evaluator)
    return [(row.run, row.version, row.reason) for row in connection.execute(query)]


def delete_failed(connection: Connection, evaluator: str, run: str = "", version: int = 0) -> None:
    """Deletes what an evaluator could not score: everything, or one version of a run."""
    t = tables.failed_evaluations
    query = delete(t).where(t.c.evaluator == evaluator)
    if run:
        query = query.where(t.c.run == run, t.c.version == version)
    connection.execute(query)
