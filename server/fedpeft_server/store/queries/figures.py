"""SQL that reads rounds as they are shown, some at a time; each function is a part of the caller's transaction.

What one call reads is bounded by what it is asked for, not by the rounds that a run has held or the clients of a round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, case, func, or_, select

from fedpeft.rounds.state_machine import ticket_id
from fedpeft_server.store import tables
from fedpeft_server.store.evaluations import merged
from fedpeft_server.store.queries.batches import batches
from fedpeft_server.store.queries.collation import bytewise
from fedpeft_server.store.queries.rounds import stored_round, stored_ticket
from fedpeft_server.store.queries.runs import select_evaluations, select_last_scored
from fedpeft_server.store.rows import GaugeSnapshot, Place, RoundFigures, TicketFigures, Traffic

Pending = Mapping[tuple[int, str], Traffic]
"""Bytes that are not in the database yet, by (round number, client)."""

RECORDS = 1024 * 1024
"""Most characters of records read at once; they are ASCII, so this is as many bytes as a page may have."""
_HEAD = [column for column in tables.rounds.c if column is not tables.rounds.c.record]
"""Columns of a round but its record, which may be a megabyte and is read only where it was asked for."""


def select_from(
    connection: Connection,
    run: str,
    place: Place,
    most_rounds: int,
    most_tickets: int,
    pending: Pending,
    characters: int = RECORDS,
) -> tuple[list[RoundFigures], Place | None]:
    """Returns rounds from a place on, in order, and where to go on; None at the end."""
    t = tables.rounds
    query = select(*_HEAD).where(t.c.run == run, t.c.number > place.after).order_by(t.c.number).limit(most_rounds + 1)
    heads = connection.execute(query).all()
    then = Place(heads[most_rounds - 1].number) if len(heads) > most_rounds else None
    heads = heads[:most_rounds]
    if not heads:
        return [], None
    records: dict[int, str] = {}
    if characters:
        records, ends = _records(connection, run, place, heads[-1].number, characters)
        if ends is not None:
            then = ends
            heads = [row for row in heads if row.number <= (ends.after + 1 if ends.record else ends.after)]
        if ends is not None and ends.record:
            offset = place.record if place.after == ends.after else 0
            return _figures(connection, run, heads, {}, pending, records, offset), then
    tickets = _tickets_from(connection, run, place, heads[-1].number, most_tickets + 1)
    if len(tickets) > most_tickets:
        last = tickets[most_tickets - 1]
        tickets, then = tickets[:most_tickets], Place(last.counts_in - 1, last.client)
        heads = [row for row in heads if row.number <= last.counts_in]
    by_round: dict[int, list[Row[Any]]] = defaultdict(list)
    for row in tickets:
        by_round[row.counts_in].append(row)
    return _figures(connection, run, heads, by_round, pending, records, place.record), then


def _records(
    connection: Connection, run: str, place: Place, last: int, most: int
) -> tuple[dict[int, str], Place | None]:
    """Returns records from a place on, read one by one until there are `most` characters, and where they end.

    None as the end means that there are no more up to round `last`. Of a single record that is longer, a piece.
    """
    t, first = tables.rounds, place.after + 1
    before = min(place.record, 2**30)  # a forged place need not fit what the database takes for a position in a text
    start = case((t.c.number == first, before + 1), else_=1)
    query = select(t.c.number, func.substr(t.c.record, start, most + 1).label("piece")).where(
        t.c.run == run, t.c.number > place.after + bool(place.client), t.c.number <= last
    )
    found: dict[int, str] = {}
    room = most
    # Row by row: a record may have megabytes, and those that do not fit are not even fetched.
    one_by_one = query.order_by(t.c.number).execution_options(stream_results=True, max_row_buffer=2)
    with connection.execute(one_by_one) as rows:
        while (row := rows.fetchone()) is not None:
            if len(row.piece) > room:
                if found or place.client:
                    return found, Place(row.number - 1)
                held = before if row.number == first else 0
                return {row.number: row.piece[:most]}, Place(row.number - 1, "", held + most)
            found[row.number] = row.piece
            room -= len(row.piece)
    return found, None


def select_with(
    connection: Connection, run: str, number: int, tickets: Sequence[str], pending: Pending
) -> RoundFigures | None:
    """Returns a round with those of its tickets that are named; None if it was never written."""
    t = tables.rounds
    head = connection.execute(select(*_HEAD).where(t.c.run == run, t.c.number == number)).one_or_none()
    if head is None:
        return None
    rows: list[Row[Any]] = []
    for some in batches(tickets):
        rows += connection.execute(_ticket_figures().where(tables.tickets.c.id.in_(some)))
    rows.sort(key=lambda row: row.client)
    return _figures(connection, run, [head], {number: rows}, pending)[0]


def select_gauge_snapshot(connection: Connection, run: str, number: int) -> GaugeSnapshot:
    """Returns what the gauges of a run show whose round in progress is `number`."""
    t = tables.rounds
    query = select(t.c.number, t.c.metrics).where(t.c.run == run, t.c.committed_at.is_not(None))
    last = connection.execute(query.order_by(t.c.number.desc()).limit(1)).first()
    committed = last.number if last else 0
    sums = _sums(connection, run, committed, number)
    return GaugeSnapshot(
        scored=select_last_scored(connection, run),
        metrics=last.metrics if last else {},
        current=sums.get(number, Traffic()) if number > committed else Traffic(),
        last=sums.get(committed, Traffic()),
    )


def _tickets_from(connection: Connection, run: str, place: Place, last: int, most: int) -> list[Row[Any]]:
    t = tables.tickets
    client = bytewise(connection, t.c.client)
    query = _ticket_figures().where(t.c.run == run, t.c.counts_in > place.after, t.c.counts_in <= last)
    if place.client:
        query = query.where(or_(t.c.counts_in > place.after + 1, client > place.client))
    return list(connection.execute(query.order_by(t.c.counts_in, client).limit(most)))


def _ticket_figures() -> Select[Any]:
    t, u, x = tables.tickets, tables.updates, tables.traffic
    figures = (u.c.examples, u.c.norm, u.c.metrics, u.c.payload_sha256)
    bytes_ = (x.c.wire_up, x.c.wire_down, x.c.payload_up, x.c.payload_down)
    joined = t.outerjoin(u, u.c.ticket == t.c.id).outerjoin(x, _same_client())
    return select(t, *figures, *bytes_).select_from(joined)


def _same_client() -> ColumnElement[bool]:
    """Returns what joins tickets with the bytes of their clients, which are those of the round that gave them out."""
    t, x = tables.tickets, tables.traffic
    return and_(x.c.run == t.c.run, x.c.number == t.c.number, x.c.client == t.c.client)


def _figures(
    connection: Connection,
    run: str,
    heads: Sequence[Row[Any]],
    tickets: Mapping[int, Sequence[Row[Any]]],
    pending: Pending,
    records: Mapping[int, str] = MappingProxyType({}),
    offset: int = 0,
) -> list[RoundFigures]:
    """Returns the rounds of some rows; `offset` characters of the first one's record were read before."""
    first, last = heads[0].number, heads[-1].number
    sums = _sums(connection, run, first, last)
    numbers = {row.number for row in heads}
    for key, number in _sampled(connection, run, (key for key in pending if key[0] <= last)):
        if number in numbers:
            sums[number] = sums.get(number, Traffic()) + pending[key]
    scored = select_evaluations(connection, run, first, last)
    found = []
    for row in heads:
        shown = tuple(_ticket(ticket, pending) for ticket in tickets.get(row.number, ()))
        found.append(
            RoundFigures(
                round=stored_round(row, (figures.ticket for figures in shown)),
                committed_at=row.committed_at,
                record=records.get(row.number, ""),
                record_offset=offset if row.number == first else 0,
                record_sha256=row.record_sha256,
                metrics={**merged(scored.get(row.number, ())), **row.metrics},
                traffic=sums.get(row.number, Traffic()),
                tickets=shown,
            )
        )
    return found


def _sums(connection: Connection, run: str, first: int, last: int) -> dict[int, Traffic]:
    """Returns the bytes of the tickets of rounds, by round number."""
    x, t = tables.traffic, tables.tickets
    sums = [func.sum(column) for column in (x.c.wire_up, x.c.wire_down, x.c.payload_up, x.c.payload_down)]
    query = select(t.c.counts_in, *sums).select_from(t.join(x, _same_client()))
    rows = connection.execute(query.where(t.c.run == run, t.c.counts_in.between(first, last)).group_by(t.c.counts_in))
    return {number: Traffic(*(int(value) for value in values)) for number, *values in rows}


def _sampled(connection: Connection, run: str, keys: Iterable[tuple[int, str]]) -> list[tuple[tuple[int, str], int]]:
    """Returns those of some (round number, client) that were given a ticket, each with the round that this is in."""
    t, by_id = tables.tickets, {ticket_id(run, *key): key for key in keys}
    found: list[tuple[tuple[int, str], int]] = []
    for some in batches(list(by_id)):
        rows = connection.execute(select(t.c.id, t.c.counts_in).where(t.c.id.in_(some)))
        found += [(by_id[row.id], row.counts_in) for row in rows]
    return found


def _ticket(row: Row[Any], pending: Pending) -> TicketFigures:
    ticket = stored_ticket(row)
    counted = Traffic(row.wire_up or 0, row.wire_down or 0, row.payload_up or 0, row.payload_down or 0)
    traffic = counted + pending.get((row.number, row.client), Traffic())
    if row.examples is None:
        return TicketFigures(ticket, traffic, row.weight or 0.0)
    return TicketFigures(ticket, traffic, row.weight or 0.0, row.examples, row.norm, row.metrics, row.payload_sha256)
