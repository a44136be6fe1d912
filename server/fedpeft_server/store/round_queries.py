"""SQL about rounds, tickets and updates; each function is a part of the caller's transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, func, insert, select, update

from fedpeft.errors import RunNotFound, TicketNotFound
from fedpeft.rounds import Phase, Round, Ticket, TicketState
from fedpeft_server.store import stored, tables
from fedpeft_server.store.rows import RoundRow, TicketRow, Traffic, UpdateRow
from fedpeft_server.store.run_queries import existing
from fedpeft_server.store.upsert import upsert

_ROUND_COLUMNS = ("phase", "opened_at", "deadline", "extensions", "stopped")
_TICKET_COLUMNS = ("state", "reason", "generation")


def put_round(connection: Connection, state: Round, before: Round | None) -> None:
    """Writes a round and those of its tickets that differ from `before`, what the database is known to hold.

    Raises:
        RunNotFound: If the round's run does not exist.
    """
    if before is None:
        if not existing(connection, [state.run]):
            raise RunNotFound(f"there is no run {state.run}")
        before = _stored_round(connection, state.run, state.number)
    row = _round_row(state)
    if before is None or row != _round_row(before):
        upsert(connection, tables.rounds, [row], replace=_ROUND_COLUMNS)
    # Most tickets are the very same objects as before, and comparing identities is what makes thousands of them cheap.
    known = {id(t) for t in before.tickets} if before is not None else set()
    others = {t.id: t for t in before.tickets} if before is not None else {}
    changed = [_ticket_row(state, t) for t in state.tickets if id(t) not in known and others.get(t.id) != t]
    upsert(connection, tables.tickets, changed, replace=_TICKET_COLUMNS)


def put_update(connection: Connection, received: UpdateRow) -> None:
    """Writes what was received for a ticket, and counts it for its client; a repetition changes nothing."""
    if select_update(connection, received.ticket) is not None:
        return
    row = {
        "ticket": received.ticket,
        "examples": received.examples,
        "norm": received.norm,
        "metrics": dict(received.metrics),
        "layout": stored.dump_layout(received.manifest),
        "payload_sha256": received.manifest.sha256.hex(),
        "received_at": received.received_at,
    }
    connection.execute(insert(tables.updates).values(row))
    client = select(tables.tickets.c.client).where(tables.tickets.c.id == received.ticket).scalar_subquery()
    counted = {"updates": tables.clients.c.updates + 1}
    connection.execute(update(tables.clients).where(tables.clients.c.id == client).values(counted))


def put_result(
    connection: Connection,
    state: Round,
    committed_at: float,
    weights: Mapping[str, float],
    record: str,
    record_sha256: str,
    metrics: Mapping[str, float],
) -> None:
    """Writes what a round's commit adds to it."""
    table = tables.rounds
    facts = {"committed_at": committed_at, "record": record, "record_sha256": record_sha256, "metrics": dict(metrics)}
    connection.execute(update(table).where(table.c.run == state.run, table.c.number == state.number).values(facts))
    if weights:
        by_id = update(tables.tickets).where(tables.tickets.c.id == bindparam("ticket"))
        rows = [{"ticket": ticket, "share": share} for ticket, share in weights.items()]
        connection.execute(by_id.values(weight=bindparam("share")), rows)


def select_rounds(connection: Connection, run: str, after: int = 0) -> list[RoundRow]:
    """Returns the rounds of a run above number `after`, in order."""
    t = tables.rounds
    found = connection.execute(select(t).where(t.c.run == run, t.c.number > after).order_by(t.c.number)).all()
    tickets: dict[int, list[Ticket]] = defaultdict(list)
    weights: dict[int, dict[str, float]] = defaultdict(dict)
    updates: dict[int, dict[str, UpdateRow]] = defaultdict(dict)
    for row in connection.execute(_tickets_with_updates(run, after)):
        tickets[row.number].append(_ticket(row))
        if row.weight is not None:
            weights[row.number][row.id] = row.weight
        if row.received_at is not None:
            updates[row.number][row.id] = _update(row)
    traffic = _select_traffic(connection, run, after)
    return [
        RoundRow(
            round=_round(row, tickets[row.number]),
            committed_at=row.committed_at,
            weights=weights[row.number],
            updates=updates[row.number],
            traffic=traffic[row.number],
            record=row.record,
            record_sha256=row.record_sha256,
            metrics=row.metrics,
        )
        for row in found
    ]


def newest_number(connection: Connection, run: str) -> int:
    """Returns the highest round number of a run, or 0."""
    return connection.execute(select(func.max(tables.rounds.c.number)).where(tables.rounds.c.run == run)).scalar() or 0


def select_ticket(connection: Connection, ticket: str) -> TicketRow:
    """Returns a ticket by id.

    Raises:
        TicketNotFound: If there is none.
    """
    row = connection.execute(select(tables.tickets).where(tables.tickets.c.id == ticket)).one_or_none()
    if row is None:
        raise TicketNotFound(f"there is no ticket {ticket}")
    return TicketRow(row.run, row.number, _ticket(row))


def select_update(connection: Connection, ticket: str) -> UpdateRow | None:
    """Returns what was received for a ticket, or None."""
    t, u = tables.tickets, tables.updates
    row = connection.execute(select(t.c.id, u).join(u, u.c.ticket == t.c.id).where(t.c.id == ticket)).first()
    return _update(row) if row else None


def last_record_sha256(connection: Connection, run: str) -> str:
    """Returns the digest of the newest record of a run, or "" if no round was committed."""
    t = tables.rounds
    query = select(t.c.record_sha256).where(t.c.run == run, t.c.committed_at.is_not(None))
    return connection.execute(query.order_by(t.c.number.desc()).limit(1)).scalar() or ""


def add_traffic(connection: Connection, deltas: Mapping[tuple[str, int, str], Traffic]) -> None:
    """Adds bytes to what was counted; those of a run that was deleted meanwhile are dropped."""
    known = existing(connection, (run for run, _, _ in deltas)) if deltas else set()
    rows = [
        {"run": run, "number": number, "client": client, **_traffic_row(bytes_)}
        for (run, number, client), bytes_ in deltas.items()
        if run in known
    ]
    upsert(connection, tables.traffic, rows, add=("wire_up", "wire_down", "payload_up", "payload_down"))


def _stored_round(connection: Connection, run: str, number: int) -> Round | None:
    t, tickets = tables.rounds, tables.tickets
    row = connection.execute(select(t).where(t.c.run == run, t.c.number == number)).one_or_none()
    if row is None:
        return None
    query = select(tickets).where(tickets.c.run == run, tickets.c.number == number)
    return _round(row, [_ticket(found) for found in connection.execute(query)])


def _tickets_with_updates(run: str, after: int) -> Select[Any]:
    t, u = tables.tickets, tables.updates
    columns = (u.c.examples, u.c.norm, u.c.metrics, u.c.layout, u.c.payload_sha256, u.c.received_at)
    return select(t, *columns).join(u, u.c.ticket == t.c.id, isouter=True).where(t.c.run == run, t.c.number > after)


def _select_traffic(connection: Connection, run: str, after: int) -> Mapping[int, dict[str, Traffic]]:
    t = tables.traffic
    found: dict[int, dict[str, Traffic]] = defaultdict(dict)
    for row in connection.execute(select(t).where(t.c.run == run, t.c.number > after)):
        found[row.number][row.client] = Traffic(row.wire_up, row.wire_down, row.payload_up, row.payload_down)
    return found


def _traffic_row(traffic: Traffic) -> dict[str, int]:
    return {
        "wire_up": traffic.wire_up,
        "wire_down": traffic.wire_down,
        "payload_up": traffic.payload_up,
        "payload_down": traffic.payload_down,
    }


def _round_row(state: Round) -> dict[str, Any]:
    return {
        "run": state.run,
        "number": state.number,
        "phase": str(state.phase),
        "opened_at": state.opened_at,
        "deadline": state.deadline,
        "extensions": state.extensions,
        "stopped": state.stopped,
    }


def _ticket_row(state: Round, ticket: Ticket) -> dict[str, Any]:
    return {
        "id": ticket.id,
        "run": state.run,
        "number": state.number,
        "client": ticket.client,
        "state": str(ticket.state),
        "reason": ticket.reason,
        "generation": ticket.generation,
    }


def _round(row: Row[Any], tickets: Iterable[Ticket]) -> Round:
    # Sorted here, because databases order text by their own rules.
    ordered = tuple(sorted(tickets, key=lambda t: t.client))
    return Round(
        row.run, row.number, Phase(row.phase), ordered, row.opened_at, row.deadline, row.extensions, row.stopped
    )


def _ticket(row: Row[Any]) -> Ticket:
    return Ticket(row.id, row.client, TicketState(row.state), row.reason, row.generation)


def _update(row: Row[Any]) -> UpdateRow:
    manifest = stored.load_manifest(row.layout, row.payload_sha256)
    return UpdateRow(row.id, row.examples, row.norm, row.metrics, manifest, row.received_at)
