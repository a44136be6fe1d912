"""Runs with many rounds or many clients, written straight into a data folder."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import insert

from fedpeft.rounds.state_machine import Phase, ticket_id
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.store import tables
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import RunRow, RunState, VersionRow
from fedpeft_server.timing import TIMING

from .conftest import SPEC, config

WIRE_UP, PAYLOAD_UP = 1000, 900
FIGURES = {f"figure_{i}": i + 0.5 for i in range(16)}


def write_run(folder: Path, run: str, rounds: int, clients: int, *, state: RunState = RunState.COMPLETED) -> None:
    """Writes a run whose rounds are all committed, each with as many updates."""
    folder.mkdir(parents=True, exist_ok=True)
    database = Database.open(f"sqlite:///{folder / 'fedpeft.db'}", TIMING)
    settings = config(rounds={"count": rounds + (state is RunState.RUNNING), "clients": clients})
    row = RunRow(run, settings, SPEC, "f" * 64, state, "", rounds, 100.0 + len(run), 1000, run, "9" * 64)
    database.create_run(row, VersionRow(run, 0, "0" * 64, 1, "", 1.0))
    names = [f"client-{i:05}" for i in range(clients)]
    keys = [(number, client, ticket_id(run, number, client)) for number in range(1, rounds + 1) for client in names]
    with database.transactions.begin() as connection:
        connection.execute(insert(tables.rounds), [_round(run, number) for number in range(1, rounds + 1)])
        connection.execute(insert(tables.versions), [_version(run, number) for number in range(1, rounds + 1)])
        connection.execute(insert(tables.tickets), [_ticket(run, *key, 1 / clients) for key in keys])
        connection.execute(insert(tables.updates), [_update(ticket) for _, _, ticket in keys])
        connection.execute(insert(tables.traffic), [_traffic(run, number, client) for number, client, _ in keys])
        connection.execute(
            insert(tables.evaluations),
            [
                {
                    "run": run,
                    "version": n,
                    "evaluator": "judge",
                    "split": "test",
                    "metrics": {"accuracy": n / 1e4},
                    "at": n,
                }
                for n in range(1, rounds + 1)
            ],
        )
    database.close()


def _round(run: str, number: int) -> dict[str, object]:
    return {
        "run": run,
        "number": number,
        "phase": str(Phase.COMMITTED),
        "opened_at": 1000.0 + number,
        "deadline": None,
        "extensions": 0,
        "stopped": False,
        "committed_at": 1000.5 + number,
        "record": "{}",
        "record_sha256": "e" * 64,
        "metrics": {"train_loss": 1.0 / number},
    }


def _version(run: str, number: int) -> dict[str, object]:
    return {
        "run": run,
        "version": number,
        "sha256": "a" * 64,
        "size_bytes": 1,
        "state_sha256": "",
        "created_at": 1.0,
    }


def _ticket(run: str, number: int, client: str, ticket: str, weight: float) -> dict[str, object]:
    return {
        "id": ticket,
        "run": run,
        "number": number,
        "counts_in": number,
        "client": client,
        "state": str(TicketState.RECEIVED),
        "reason": "",
        "generation": 0,
        "weight": weight,
    }


def _update(ticket: str) -> dict[str, object]:
    return {
        "ticket": ticket,
        "examples": 64,
        "norm": 1.25,
        "metrics": FIGURES,
        "layout": b"",
        "payload_sha256": "d" * 64,
        "received_at": 1000.0,
    }


def _traffic(run: str, number: int, client: str) -> dict[str, object]:
    sums = {"wire_up": WIRE_UP, "wire_down": 5, "payload_up": PAYLOAD_UP, "payload_down": 4}
    return {"run": run, "number": number, "client": client, **sums}
