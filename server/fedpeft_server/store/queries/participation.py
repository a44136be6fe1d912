"""SQL about what clients answered to the offer of a run; each function is a part of the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, bindparam, or_, select, tuple_, update

from fedpeft.rounds.conduct import GOOD, Conduct
from fedpeft_server.store import tables
from fedpeft_server.store.queries.batches import batches
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import AnswerRow

_IS_POOR = or_(*(tables.answers.c[name] != getattr(GOOD, name) for name in ("missed", "missed_in", "refused")))


def put_answers(connection: Connection, answers: Sequence[AnswerRow]) -> None:
    """Writes answers in place of earlier ones, the last of a client and run; the clients' conduct stays as it is."""
    rows = {
        (answer.run, answer.client): {
            "run": answer.run,
            "client": answer.client,
            "accepted": answer.accepted,
            "reasons": list(answer.reasons),
            "examples": answer.examples,
            "at": answer.at,
        }
        for answer in answers
    }
    upsert(connection, tables.answers, list(rows.values()), replace=("accepted", "reasons", "examples", "at"))


def select_answers(connection: Connection) -> list[AnswerRow]:
    """Returns all answers."""
    return [_answer(row) for row in connection.execute(select(tables.answers))]


def select_answers_of(connection: Connection, pairs: Sequence[tuple[str, str]]) -> list[AnswerRow]:
    """Returns the answers of those (run, client) that there are."""
    t, found = tables.answers, list[AnswerRow]()
    for some in batches(pairs):
        query = select(t).where(tuple_(t.c.run, t.c.client).in_(some))
        found += map(_answer, connection.execute(query))
    return found


def _answer(row: Row[Any]) -> AnswerRow:
    conduct = Conduct(row.missed, row.missed_in, row.refused)
    return AnswerRow(row.run, row.client, row.accepted, tuple(row.reasons), row.examples, row.at, conduct)


def select_conducts(connection: Connection, run: str, clients: Sequence[str]) -> dict[str, Conduct]:
    """Returns how those clients used their last tickets of a run that answered its offer."""
    t, found = tables.answers, dict[str, Conduct]()
    query = select(t.c.client, t.c.missed, t.c.missed_in, t.c.refused).where(t.c.run == run)
    for some in batches(clients):
        rows = connection.execute(query.where(t.c.client.in_(some)))
        found |= {row.client: Conduct(row.missed, row.missed_in, row.refused) for row in rows}
    return found


def select_poor_conducts(connection: Connection, run: str) -> dict[str, Conduct]:
    """Returns how clients used their last tickets of a run that missed or had refused some."""
    t = tables.answers
    query = select(t.c.client, t.c.missed, t.c.missed_in, t.c.refused).where(t.c.run == run, _IS_POOR)
    return {row.client: Conduct(row.missed, row.missed_in, row.refused) for row in connection.execute(query)}


def put_conducts(connection: Connection, run: str, conducts: Mapping[str, Conduct]) -> None:
    """Writes how clients used their last tickets of a run."""
    if conducts:
        t = tables.answers
        names = ("missed", "missed_in", "refused")
        statement = update(t).where(t.c.run == run, t.c.client == bindparam("of"))
        rows = [{"of": client, **{f"new_{n}": getattr(each, n) for n in names}} for client, each in conducts.items()]
        connection.execute(statement.values({name: bindparam(f"new_{name}") for name in names}), rows)
