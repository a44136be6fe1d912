"""SQL that reads all there is of a run, for checks and copies of a server that is stopped."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from fedpeft.rounds import record
from fedpeft.rounds.state_machine import Phase
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import tables
from fedpeft_server.store.rows import RunState, VersionRow


def select_runs(connection: Connection) -> list[str]:
    """Returns the ids of all runs, oldest first."""
    return list(connection.execute(select(tables.runs.c.id).order_by(tables.runs.c.created_at)).scalars())


def select_versions(connection: Connection, run: str) -> list[VersionRow]:
    """Returns all versions of a run, oldest first."""
    t = tables.versions
    rows = connection.execute(select(t).where(t.c.run == run).order_by(t.c.version))
    return [VersionRow.of(row._asdict()) for row in rows]


def select_records(connection: Connection, run: str) -> list[tuple[int, str, str]]:
    """Returns number, record and recorded digest of each committed round of a run, oldest first."""
    t = tables.rounds
    query = select(t.c.number, t.c.record, t.c.record_sha256).where(t.c.run == run, t.c.phase == str(Phase.COMMITTED))
    return [(row.number, row.record, row.record_sha256) for row in connection.execute(query.order_by(t.c.number))]


def select_sums(connection: Connection, run: str) -> dict[int, str]:
    """Returns the digests of the sums of a run that a parent's server may still ask for, by round."""
    n, r = tables.rounds, tables.runs
    query = select(n.c.number, n.c.record).join(r, r.c.id == n.c.run)
    rows = connection.execute(query.where(n.c.run == run, n.c.number > r.c.version, n.c.record != ""))
    return {number: record.parse(text).sum_sha256 for number, text in rows}


def select_wanted(connection: Connection) -> Iterator[tuple[str, str, str, str]]:
    """Yields run, client, ticket and payload's digest of the updates that were received and not folded yet."""
    r, n, t, u = tables.runs, tables.rounds, tables.tickets, tables.updates
    query = (
        select(t.c.run, t.c.client, t.c.id, u.c.payload_sha256)
        .join(u, u.c.ticket == t.c.id)
        .join(n, (n.c.run == t.c.run) & (n.c.number == t.c.counts_in))
        .join(r, r.c.id == t.c.run)
        .where(
            t.c.state == str(TicketState.RECEIVED),
            n.c.phase.in_((str(Phase.OPEN), str(Phase.AGGREGATING))),
            n.c.stopped.is_(False),
            r.c.state.in_((str(RunState.RUNNING), str(RunState.PAUSED))),
        )
        .order_by(t.c.run, t.c.client)
    )
    for row in connection.execute(query):
        yield tuple(row)


def select_tickets(connection: Connection) -> set[str]:
    """Returns the ids of all tickets."""
    return set(connection.execute(select(tables.tickets.c.id)).scalars())
