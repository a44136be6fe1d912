"""SQL about what clients answered to the offer of a run; each function is a part of the caller's transaction."""

from __future__ import annotations

from sqlalchemy import Connection, select

from fedpeft_server.store import tables
from fedpeft_server.store.rows import AnswerRow
from fedpeft_server.store.upsert import upsert


def put_answer(connection: Connection, answer: AnswerRow) -> None:
    """Writes an answer in place of an earlier one."""
    row = {
        "run": answer.run,
        "client": answer.client,
        "accepted": answer.accepted,
        "reasons": list(answer.reasons),
        "examples": answer.examples,
        "at": answer.at,
    }
    upsert(connection, tables.answers, [row], replace=("accepted", "reasons", "examples", "at"))


def select_answers(connection: Connection) -> list[AnswerRow]:
    """Returns all answers."""
    return [
        AnswerRow(row.run, row.client, row.accepted, tuple(row.reasons), row.examples, row.at)
        for row in connection.execute(select(tables.answers))
    ]
