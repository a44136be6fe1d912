"""Two servers on one database: their stores, their engines of one run, and what must hold whatever they did."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.adapters import payload
from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import FedpeftError, PayloadInvalid, TicketNotFound
from fedpeft.identity import audit
from fedpeft.rounds.commit import write_version
from fedpeft.rounds.events import TimePassed
from fedpeft.rounds.record import verify_chain
from fedpeft.rounds.state_machine import Round, ticket_id
from fedpeft.rounds.tickets import TicketState
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs.aggregation import run_header
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.runs.participation import Participation
from fedpeft_server.store.rows import (
    AnswerRow,
    Place,
    RoundFigures,
    RunRow,
    RunState,
    UpdateRow,
    VersionRow,
)
from fedpeft_server.store.store import Store, version_key
from fedpeft_server.timing import TIMING
from fedpeft_server.traffic import ByteCounter

from ..conftest import SPEC, filled, zeros

CLIENTS = ("a", "b", "c")
CONFIG = parse_config(
    {
        "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b", "c"]},
        "peft": {"method": "bias"},
        "rounds": {"count": 3, "clients": 2, "quorum": 1, "deadline_s": 1000.0, "max_extensions": 1},
    }
)
BUFFERED = parse_config(
    {
        "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b", "c"]},
        "peft": {"method": "bias"},
        "rounds": {
            "policy": "buffered",
            "count": 4,
            "clients": 2,
            "concurrency": 3,
            "max_staleness": 1,
            "quorum": 1,
            "min_available": 2,
            "deadline_s": 1000.0,
            "max_extensions": 1,
        },
        "aggregation": {"strategy": "fedbuff"},
    }
)


class Clock:
    """The module `time`, as far as engines use it, with a clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Cluster:
    """Stores of servers that share database, versions and updates, each with a data folder of its own."""

    stores: Sequence[Store]
    clock: Clock

    @property
    def database(self) -> Any:
        return self.stores[0].db

    async def create(self, config: RunConfig = CONFIG) -> RunRow:
        """Writes a run, which all clients accepted, to database and blobs."""
        self.clock.now = 1_000_000.0
        run = RunRow(f"run-{secrets.token_hex(6)}", config, SPEC, "ab" * 32, RunState.RUNNING, "", 0, 1.0)
        store = self.stores[0]
        path = store.scratch / run.id
        written = write_version(run_header(run), zeros(), path)
        store.blobs.put(version_key(run.id, 0), path)
        version = VersionRow(run.id, 0, written.sha256, written.size_bytes, "", 1.0)
        await store.transact(store.db.create_run, run, version)
        await store.transact(store.db.put_answers, [AnswerRow(run.id, name, True) for name in CLIENTS])
        return run


class Server:
    """One server's engine of a run, without its calls."""

    def __init__(self, store: Store, run: RunRow, current: Round) -> None:
        self.store = store
        metrics, faults = Metrics(), list[bool]()
        self.background = Background(metrics, lambda: faults.append(True))
        self.faults = faults
        participation = Participation(AnswerRow(run.id, name, True) for name in CLIENTS)
        byte_counter = ByteCounter(metrics, TIMING)
        parts = store, Lobby(lambda: None, TIMING), participation, byte_counter, metrics, self.background
        self.engine = RunEngine(run, current, *parts, lambda run, tickets: None, lambda engine: None, TIMING)

    @classmethod
    async def of(cls, store: Store, run: str) -> Server:
        ((row, current),) = await store.transact(store.db.standings, run)
        server = cls(store, row, current)
        await server.engine.start()
        return server

    async def idle(self) -> None:
        """Waits until what follows from the last transitions is done."""
        for _ in range(3):
            await self.engine.folding.idle()
            await self.engine.actor.tasks.wait()

    async def close(self) -> None:
        self.engine.folding.drain()
        await self.background.close()  # in the order of the daemon
        await self.engine.close()
        assert not self.faults, "no background work may end the server"

    def ticket(self, client: str, number: int) -> str:
        return ticket_id(self.engine.run.id, number, client)

    async def offer(self, clients: str) -> None:
        """Looks for clients as a server does each second, and after each change."""
        await self.engine.refresh()
        await self.engine.offer(frozenset(clients), 0.0)

    async def receive(self, client: str, number: int, value: float = 1.0) -> str:
        """Spools an update and counts it; returns its receipt, or the reason for which it is refused."""
        ticket = self.ticket(client, number)
        manifest, data = payload.encode(filled(value), SPEC.sent(number), "float32")
        try:
            with self.store.updates.writer(ticket, manifest) as writer:
                if writer.position < len(data):
                    writer.write(writer.position, data[writer.position :])
                writer.finish()
            row = UpdateRow(ticket, 10, value, {"loss": value}, manifest, 5.0)
            return (await self.engine.receive(row, client)).manifest.sha256.hex()
        except FedpeftError as error:
            return error.reason

    async def withdraw(self, client: str, number: int) -> str:
        ticket = self.ticket(client, number)
        found = next((t for t in self.engine.round.tickets if t.id == ticket), None)
        if found is None:
            await self.engine.refresh()
            found = next((t for t in self.engine.round.tickets if t.id == ticket), None)
        if found is None:
            return TicketNotFound.reason
        try:
            return await self.engine.withdraw(found, "no power", client)
        except FedpeftError as error:
            return error.reason

    async def refuse(self, client: str, number: int) -> None:
        await self.engine.refresh()
        ticket = next((t for t in self.engine.round.tickets if t.id == self.ticket(client, number)), None)
        if ticket is not None:
            await self.engine.refuse(ticket, PayloadInvalid("a value is not finite"), client)

    async def deadline(self) -> None:
        await self.engine.refresh()
        await self.engine.actor.call(lambda: self.engine.actor.advance(TimePassed()))

    async def command(self, name: str, *arguments: object) -> str:
        """Gives an operator's command; returns the reason for which it is refused."""
        try:
            await getattr(self.engine, name)(*arguments, "operator")
        except FedpeftError as error:
            return error.reason
        return ""


def shown(store: Store, run: str) -> list[RoundFigures]:
    return store.db.rounds_from(run, Place(), 99, 999, {})[0]


def check(store: Store, run: str, receipts: Sequence[tuple[str, str]]) -> None:
    """Checks what must hold of a run whatever two servers did: each thing once, nothing lost.

    Args:
        store: The database.
        run: The run.
        receipts: Ticket and digest of each update that was answered with a receipt.
    """
    row, rounds = store.db.run(run), shown(store, run)
    entries = [e for e in store.db.transactions.entries_after(0, 100_000)]
    audit.verify(entries)
    said = [(e.action, json.loads(e.details)) for e in entries if e.object == run]
    committed = [r for r in rounds if r.record]
    assert [r.round.number for r in committed] == list(range(1, row.version + 1))
    verify_chain([r.record for r in committed])
    folded = Counter(details["round"] for action, details in said if action == "round.committed")
    back = sum(action == "run.rolled_back" for action, _ in said)
    assert set(folded.values()) <= {1} and sum(folded.values()) + back == row.version
    received = Counter(details["ticket"] for action, details in said if action == "update.received")
    assert set(received.values()) <= {1}, "an update is counted once"
    tickets = [t for r in rounds for t in r.tickets]
    assert len({t.ticket.id for t in tickets}) == len(tickets)
    with_update = {t.ticket.id: t.payload_sha256 for t in tickets if t.payload_sha256}
    assert set(with_update) == set(received)
    for ticket, digest in receipts:
        assert with_update[ticket] == digest, "a receipt means durable"
    for shown_round in committed:
        contributions = {c["ticket"] for c in json.loads(shown_round.record)["contributions"]}
        assert contributions == {t.ticket.id for t in shown_round.tickets if t.ticket.state is TicketState.RECEIVED}
        assert contributions == {t.ticket.id for t in shown_round.tickets if t.weight}
    for version in range(row.version + 1):
        stored = store.db.version(run, version)
        with store.blobs.local(version_key(run, version, stored.source, stored.draw)) as path, path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256
