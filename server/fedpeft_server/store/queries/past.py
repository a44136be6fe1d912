"""SQL about what the last rounds took a client; each function is a part of the caller's transaction.

A ticket's id says run, round and client, so that those of a few rounds are looked up by their keys: what a call reads
does not depend on how many rounds were held, or how many clients were sampled for them.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, and_, func, select

from fedpeft.rounds.state_machine import ticket_id
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import tables
from fedpeft_server.store.queries.batches import VALUES, batches

ROUNDS_BACK = 20
"""Rounds that are looked at."""
MOST = 5
"""Updates of a client that count."""

Taken = tuple[float, float | None]
"""Seconds from the issue of a ticket to the receipt of its update, and for a step of its training if it said so."""


def select_pasts(connection: Connection, run: str, number: int, clients: Sequence[str]) -> dict[str, list[Taken]]:
    """Returns what the tickets of the last rounds before `number` took some clients, by client, the newest first.

    Tickets of an extension were given out later than the round was opened, and are left out.
    """
    t, u, r = tables.tickets, tables.updates, tables.rounds
    numbers = range(max(1, number - ROUNDS_BACK), number)
    found: dict[str, list[Taken]] = {}
    query = (
        select(t.c.client, u.c.received_at, u.c.metrics, func.coalesce(t.c.issued_at, r.c.opened_at).label("began"))
        .join(u, u.c.ticket == t.c.id)
        .join(r, and_(r.c.run == t.c.run, r.c.number == t.c.number))
        .where(t.c.generation == 0, t.c.state == str(TicketState.RECEIVED), r.c.opened_at.is_not(None))
        .order_by(t.c.number.desc())
    )
    for some in batches(clients, VALUES // ROUNDS_BACK):
        ids = [ticket_id(run, each, client) for each in numbers for client in some]
        for row in connection.execute(query.where(t.c.id.in_(ids))):
            mine = found.setdefault(row.client, [])
            if len(mine) < MOST:
                mine.append((row.received_at - row.began, _step_s(row.metrics)))
    return found


def _step_s(metrics: dict[str, float]) -> float | None:
    """Returns how long a step took, by the figures of an update, if they say it."""
    seconds, steps = metrics.get("seconds"), metrics.get("steps")
    return seconds / steps if seconds is not None and steps else None
