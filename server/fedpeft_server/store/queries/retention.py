"""SQL about the versions that a retention keeps or removes; each function is a part of the caller's transaction.

No statement looks at versions that were decided on before: each is one range of the index on state, run and version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, select, update

from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import tables
from fedpeft_server.store.rows import FileState, VersionRow

_PINS = (str(TicketState.ISSUED), str(TicketState.RECEIVED))


def select_standing(connection: Connection, run: str) -> tuple[int, int] | None:
    """Returns the newest version of a run, and the first that is not decided on, and locks them; None without a run."""
    t = tables.runs
    query = select(t.c.version, t.c.retained_from).where(t.c.id == run).with_for_update()
    row = connection.execute(query).one_or_none()
    return None if row is None else (row.version, row.retained_from)


def select_retained_from(connection: Connection, run: str) -> int:
    """Returns the first version of a run that is not decided on; the run exists."""
    return int(connection.execute(select(tables.runs.c.retained_from).where(tables.runs.c.id == run)).scalar_one())


def put_standing(connection: Connection, run: str, retained_from: int) -> None:
    """Writes which version is the first that is not decided on."""
    connection.execute(update(tables.runs).where(tables.runs.c.id == run).values(retained_from=retained_from))


def select_in(connection: Connection, run: str, state: FileState, most: int | None = None) -> list[VersionRow]:
    """Returns the versions of a run in a state, oldest first."""
    t = tables.versions
    query = select(t).where(t.c.retention == str(state), t.c.run == run).order_by(t.c.version).limit(most)
    return [VersionRow.of(row._asdict()) for row in connection.execute(query)]


def select_between(connection: Connection, run: str, first: int, end: int) -> list[int]:
    """Returns the versions of a run from `first` on and below `end`; of a relayed run some numbers are missing."""
    t = tables.versions
    query = select(t.c.version).where(t.c.run == run, t.c.version >= first, t.c.version < end)
    return list(connection.execute(query).scalars())


def put_states(connection: Connection, run: str, states: Mapping[int, FileState]) -> None:
    """Writes the states of versions."""
    t = tables.versions
    for state in sorted(set(states.values())):
        numbers = [number for number, other in states.items() if other is state]
        connection.execute(update(t).where(t.c.run == run, t.c.version.in_(numbers)).values(retention=str(state)))


def select_bases(connection: Connection, run: str, number: int) -> set[int]:
    """Returns the versions that tickets of a round start from which are out, or may be given out again."""
    t = tables.tickets
    # Not DISTINCT: for that SQLite would go through the tickets of all rounds, in the order of another index.
    query = select(t.c.number).where(t.c.run == run, t.c.counts_in == number, t.c.state.in_(_PINS))
    return {issued_in - 1 for issued_in in connection.execute(query).scalars()}


def select_runs_in(connection: Connection, state: FileState) -> list[str]:
    """Returns the runs that have versions in a state."""
    t = tables.versions
    return list(connection.execute(select(t.c.run).where(t.c.retention == str(state)).distinct()).scalars())


def select_removed(connection: Connection) -> list[tuple[str, int]]:
    """Returns run and number of all versions whose files are removed, or about to be."""
    t = tables.versions
    states = (str(FileState.REMOVING), str(FileState.REMOVED))
    rows = connection.execute(select(t.c.run, t.c.version).where(t.c.retention.in_(states)))
    return [(row.run, row.version) for row in rows]


def select_nearest(connection: Connection, run: str, version: int) -> Sequence[int]:
    """Returns the nearest versions before and after one whose files are there."""
    t, before, after = tables.versions, list[int](), list[int]()
    for state in (FileState.KEPT, FileState.HELD):
        there = select(t.c.version).where(t.c.retention == str(state), t.c.run == run)
        down = there.where(t.c.version < version).order_by(t.c.version.desc()).limit(1)
        up = there.where(t.c.version > version).order_by(t.c.version).limit(1)
        before += connection.execute(down).scalars()
        after += connection.execute(up).scalars()
    return (*([max(before)] if before else ()), *([min(after)] if after else ()))
