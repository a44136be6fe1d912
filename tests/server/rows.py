"""Rows to fill a database with, and what it shows of its rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedpeft.adapters.adapter_file import Written
from fedpeft.adapters.payload import Entry, Manifest
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.config import RunConfig, parse_config
from fedpeft.rounds.commit import Outcome
from fedpeft.rounds.events import Received, Waiting
from fedpeft.rounds.state_machine import Round, advance
from fedpeft.rounds.transitions import RunStatus, changes
from fedpeft_server.store.database import NONE, Bytes, Database
from fedpeft_server.store.rows import Place, RoundFigures, RunRow, RunState, Transition, UpdateRow, VersionRow

RUN = "run-000000000001"
CONFIG: RunConfig = parse_config(
    {
        "name": "emoji",
        "model": {"name": "vit_tiny", "classes": ["a", "b"]},
        "peft": {"method": "lora", "rank": 8},
        "rounds": {"clients": 3, "quorum": 1},
        "simulation": {"clients": 9},
    }
)
SPEC = AdapterSpec.of(
    "lora", [TensorSpec("head.bias", (2,)), TensorSpec("lora.A", (8, 4), (TensorRole.SENT, TensorRole.FROZEN))]
)
MANIFEST = Manifest(
    (Entry("head.bias", (2,), "float32", 0, 8), Entry("lora.A", (8, 4), "float32", 8, 128)), 136, b"d" * 32
)


def run_row(run: str = RUN, **changes: object) -> RunRow:
    row = RunRow(run, CONFIG, SPEC, "f" * 64, RunState.RUNNING, "", 0, 100.25, 85_000_000, f"request-{run}", "9" * 64)
    return replace(row, **changes)  # type: ignore[arg-type]


def version_row(version: int, run: str = RUN) -> VersionRow:
    return VersionRow(run, version, f"{version:064}", 2**40 + version, "", 1.0 + version)


def update_row(ticket: str, at: float = 5.5) -> UpdateRow:
    return UpdateRow(ticket, 10**9, 0.1 + 0.2, {"loss": 1 / 3}, MANIFEST, at)


def opened(number: int = 1, run: str = RUN, clients: int = 3) -> Round:
    names = frozenset(f"client-{i:05}" for i in range(clients))
    rounds = CONFIG.rounds.model_copy(update={"clients": clients})
    return advance(Round(run, number), Waiting(names), rounds, 1000.125)[0]


def after_receipt(state: Round, position: int = 0) -> Round:
    return advance(state, Received(state.tickets[position].id), CONFIG.rounds, 1001.0)[0]


def running(state: Round) -> RunStatus:
    """The status of a running run at this round."""
    return RunStatus(0, RunState.RUNNING, "", state.number - 1, state)


def outcome(record: str = "{}", weights: Mapping[str, float] = {}, **metrics: float) -> Outcome:
    adapter = Written("a" * 64, 1)
    return Outcome(adapter, "", weights, record, "e" * 64, metrics, {}, None)


def write(database: Database, state: Round, /, *updates: UpdateRow, traffic: Bytes = NONE, **facts: Any) -> None:
    """Writes a round as the transition from what the database has; `facts` are of the run, or the transition's own."""
    run, current = database.standings(state.run)[0]
    of_run = {name: facts.pop(name) for name in ("state", "reason", "version") if name in facts}
    known = current if current.number == state.number else Round(state.run, state.number)
    before = RunStatus(run.revision, run.state, run.reason, run.version, known)
    made = changes(before, replace(before, round=state, **of_run), run.config.rounds, 1.0)
    database.transit(Transition(made, updates, **facts), traffic)


BEGINNING = Place()


def shown(database: Database, place: Place = BEGINNING, most: int = 10_000) -> list[RoundFigures]:
    """The rounds of the run as they are shown."""
    return database.rounds_from(RUN, place, most, most, {})[0]
