"""SQL about rounds, tickets and updates; each function is a part of the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Row, bindparam, delete, insert, select, update

from fedpeft.errors import TicketNotFound
from fedpeft.privacy.events import Event
from fedpeft.rounds.commit import Outcome
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import Ticket, Tickets, TicketState
from fedpeft.rounds.transitions import Changes
from fedpeft_server.store import stored, tables
from fedpeft_server.store.queries.batches import batches
from fedpeft_server.store.queries.runs import existing
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import TicketRow, Traffic, UpdateRow

_ROUND_COLUMNS = ("phase", "opened_at", "deadline", "extensions", "stopped")
_TICKET_COLUMNS = ("state", "reason", "generation", "counts_in", "issued_at")

# Statements of every receipt are built once: that takes several times as long as SQLite takes to execute them.
_INSERT_UPDATE = insert(tables.updates)
_DELETE_UPDATE = delete(tables.updates).where(tables.updates.c.ticket == bindparam("of_ticket"))
_OF_CLIENT = update(tables.clients).where(tables.clients.c.id == bindparam("client"))
_COUNT = _OF_CLIENT.values(updates=tables.clients.c.updates + 1)
_UNCOUNT = _OF_CLIENT.values(updates=tables.clients.c.updates - 1)
_TRAFFIC_KEY = {name: tables.traffic.c[name] for name in ("run", "number", "client")}
_TRAFFIC_BYTES = ("wire_up", "wire_down", "payload_up", "payload_down")
_COUNTED = select(*(tables.traffic.c[name] for name in _TRAFFIC_BYTES)).where(
    *(column == bindparam(f"of_{name}") for name, column in _TRAFFIC_KEY.items())
)
_UPDATE = select(tables.tickets.c.id, tables.updates).join(
    tables.updates, tables.updates.c.ticket == tables.tickets.c.id
)
_UPDATE_OF_TICKET = _UPDATE.where(tables.tickets.c.id == bindparam("of_ticket"))
_WEIGH = update(tables.tickets).where(tables.tickets.c.id == bindparam("ticket")).values(weight=bindparam("share"))


def select_known(connection: Connection, tickets: Sequence[str]) -> set[str]:
    """Returns those of the tickets that the database has."""
    known = set[str]()
    for some in batches(tickets):
        known.update(connection.execute(select(tables.tickets.c.id).where(tables.tickets.c.id.in_(some))).scalars())
    return known


def put_changes(connection: Connection, changes: Changes) -> None:
    """Writes what a transition, for which the run was moved to its next revision, changes of the round."""
    written = [changes.round] if changes.writes_round else []
    rows = [_ticket_row(changes.round, ticket) for ticket in changes.tickets]
    if changes.begun is not None:
        written.append(changes.begun)
        rows += [_ticket_row(changes.begun, ticket) for ticket in changes.begun.tickets]
    rows += [{**_ticket_row(changes.round, old), "counts_in": old.issued_in} for old in changes.replaced]
    upsert(connection, tables.rounds, [_round_row(state) for state in written], replace=_ROUND_COLUMNS)
    upsert(connection, tables.tickets, rows, replace=_TICKET_COLUMNS)
    if changes.again:
        connection.execute(_DELETE_UPDATE, [{"of_ticket": ticket} for ticket in changes.again])
    if changes.uncounted:
        connection.execute(_UNCOUNT, [{"client": client} for client in changes.uncounted])


def insert_updates(connection: Connection, received: Mapping[str, UpdateRow]) -> None:
    """Inserts what was received of clients, and counts it for them."""
    if received:
        connection.execute(_INSERT_UPDATE, [_update_row(update) for update in received.values()])
        connection.execute(_COUNT, [{"client": client} for client in sorted(received)])


def select_norms(connection: Connection, run: str, numbers: Sequence[int]) -> dict[int, list[tuple[float, int]]]:
    """Returns norm and examples of the updates that count in some rounds of a run, by round number."""
    t, u = tables.tickets, tables.updates
    query = select(t.c.counts_in, u.c.norm, u.c.examples).join(u, u.c.ticket == t.c.id)
    query = query.where(t.c.run == run, t.c.counts_in.in_(numbers), t.c.state == str(TicketState.RECEIVED))
    found: dict[int, list[tuple[float, int]]] = {}
    for number, norm, examples in connection.execute(query):
        found.setdefault(number, []).append((norm, examples))
    return found


def put_result(connection: Connection, state: Round, committed_at: float, outcome: Outcome) -> None:
    """Writes what a round's commit adds to it."""
    table = tables.rounds
    facts = {"committed_at": committed_at, "record": outcome.record, "record_sha256": outcome.record_sha256}
    facts["metrics"] = dict(outcome.metrics)
    facts["events"] = stored.dump_events(outcome.events)
    connection.execute(update(table).where(table.c.run == state.run, table.c.number == state.number).values(facts))
    if outcome.weights:
        shares = [{"ticket": ticket, "share": share} for ticket, share in outcome.weights.items()]
        connection.execute(_WEIGH, shares)


def select_ledger(connection: Connection, run: str, number: int) -> list[Event]:
    """Returns the events of all rounds of a run before one, oldest first."""
    t = tables.rounds
    query = select(t.c.events).where(t.c.run == run, t.c.number < number, t.c.events != "").order_by(t.c.number)
    return [event for text in connection.execute(query).scalars() for event in stored.load_events(text)]


def select_newest(connection: Connection, run: str) -> Round | None:
    """Returns the round of the highest number, or None if there is none."""
    t, tickets = tables.rounds, tables.tickets
    row = connection.execute(select(t).where(t.c.run == run).order_by(t.c.number.desc()).limit(1)).one_or_none()
    if row is None:
        return None
    found = connection.execute(select(tickets).where(tickets.c.run == run, tickets.c.counts_in == row.number))
    return stored_round(row, [stored_ticket(one) for one in found])


def select_updates(connection: Connection, run: str, number: int) -> dict[str, UpdateRow]:
    """Returns what was received in a round, by ticket, whichever round gave that out."""
    t = tables.tickets
    rows = connection.execute(_UPDATE.where(t.c.run == run, t.c.counts_in == number))
    return {row.id: _update(row) for row in rows}


def select_ticket_ids(connection: Connection, run: str) -> list[str]:
    """Returns the ids of all tickets of a run."""
    return list(connection.execute(select(tables.tickets.c.id).where(tables.tickets.c.run == run)).scalars())


def select_ticket(connection: Connection, ticket: str) -> TicketRow:
    """Returns a ticket by id.

    Raises:
        TicketNotFound: If there is none.
    """
    row = connection.execute(select(tables.tickets).where(tables.tickets.c.id == ticket)).one_or_none()
    if row is None:
        raise TicketNotFound(f"there is no ticket {ticket}")
    return TicketRow(row.run, stored_ticket(row))


def select_update(connection: Connection, ticket: str) -> UpdateRow | None:
    """Returns what was received for a ticket, or None."""
    row = connection.execute(_UPDATE_OF_TICKET, {"of_ticket": ticket}).first()
    return _update(row) if row else None


def select_record_sha256(connection: Connection, run: str, number: int) -> str:
    """Returns the digest of the record of a round, or "" if there is none."""
    t = tables.rounds
    query = select(t.c.record_sha256).where(t.c.run == run, t.c.number == number)
    return connection.execute(query).scalar() or ""


def select_committed_before(connection: Connection, run: str, number: int) -> tuple[str, Mapping[str, float]]:
    """Returns the record's digest and the figures of the newest committed round before one; empty if there is none."""
    t = tables.rounds
    query = select(t.c.record_sha256, t.c.metrics).where(t.c.run == run, t.c.number < number, t.c.record_sha256 != "")
    row = connection.execute(query.order_by(t.c.number.desc()).limit(1)).first()
    return (row.record_sha256, row.metrics) if row else ("", {})


def select_record(connection: Connection, run: str, number: int) -> tuple[str, Mapping[str, float]]:
    """Returns the record of a round and its figures; empty if it is not committed."""
    t = tables.rounds
    row = connection.execute(select(t.c.record, t.c.metrics).where(t.c.run == run, t.c.number == number)).first()
    return (row.record, row.metrics) if row else ("", {})


def add_traffic(
    connection: Connection, deltas: Mapping[tuple[str, int, str], Traffic], known: Collection[str] = ()
) -> None:
    """Adds bytes to what was counted; those of a run that was deleted meanwhile are dropped.

    Args:
        connection: In a transaction.
        deltas: Bytes to add, by run, round and client.
        known: Runs that exist, which the transaction has seen to.
    """
    others = {run for run, _, _ in deltas}.difference(known)
    known = existing(connection, others).union(known) if others else known
    rows = [
        {"run": run, "number": number, "client": client, **_traffic_row(bytes_)}
        for (run, number, client), bytes_ in sorted(deltas.items(), key=itemgetter(0))  # two servers lock alike
        if run in known
    ]
    upsert(connection, tables.traffic, rows, add=_TRAFFIC_BYTES)


def count_at_least(connection: Connection, least: Mapping[tuple[str, int, str], Traffic]) -> None:
    """Raises the payload bytes that were counted to a least, and the wire bytes to those; lowers nothing."""
    raised = {}
    for (run, number, client), wanted in least.items():
        key = {"of_run": run, "of_number": number, "of_client": client}
        found = connection.execute(_COUNTED, key).one_or_none()
        counted = Traffic(*found) if found else Traffic()
        lacking = counted.short_of(wanted.payload_up, wanted.payload_down)
        if lacking != Traffic():
            raised[run, number, client] = lacking
    known = existing(connection, (run for run, _, _ in raised)) if raised else set()
    rows = [
        {"run": run, "number": number, "client": client, **_traffic_row(bytes_)}
        for (run, number, client), bytes_ in sorted(raised.items(), key=itemgetter(0))
        if run in known
    ]
    upsert(connection, tables.traffic, rows, add=_TRAFFIC_BYTES)  # another server may have added to it meanwhile


def select_places(connection: Connection, tickets: Iterable[str]) -> dict[str, tuple[str, int, str]]:
    """Returns run, round and client of those of some tickets that exist."""
    t, found = tables.tickets, {}
    for some in batches(list(tickets)):
        for row in connection.execute(select(t.c.id, t.c.run, t.c.number, t.c.client).where(t.c.id.in_(some))):
            found[row.id] = (row.run, row.number, row.client)
    return found


def stored_round(row: Row[Any], tickets: Iterable[Ticket]) -> Round:
    """Returns the round of a row, with tickets."""
    # Sorted here, because databases order text by their own rules.
    ordered = Tickets(sorted(tickets, key=lambda t: t.client))
    return Round(
        row.run, row.number, Phase(row.phase), ordered, row.opened_at, row.deadline, row.extensions, row.stopped
    )


def stored_ticket(row: Row[Any]) -> Ticket:
    """Returns the ticket of a row."""
    state, base = TicketState(row.state), row.number - 1
    return Ticket(row.id, row.client, state, row.reason, row.generation, base, row.issued_at or 0.0)


def _update_row(received: UpdateRow) -> dict[str, Any]:
    return {
        "ticket": received.ticket,
        "examples": received.examples,
        "norm": received.norm,
        "metrics": dict(received.metrics),
        "layout": stored.dump_layout(received.manifest),
        "payload_sha256": received.manifest.sha256.hex(),
        "received_at": received.received_at,
    }


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
        "number": ticket.issued_in,
        "client": ticket.client,
        "state": str(ticket.state),
        "reason": ticket.reason,
        "generation": ticket.generation,
        "counts_in": state.number,
        "issued_at": ticket.issued_at,
    }


def _update(row: Row[Any]) -> UpdateRow:
    manifest = stored.load_manifest(row.layout, row.payload_sha256)
    return UpdateRow(row.id, row.examples, row.norm, row.metrics, manifest, row.received_at)
