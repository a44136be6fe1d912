"""Promise 5 against updates that are well formed and made to ruin a run: the round goes on without them and says so."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from fedpeft.config import RunConfig
from fedpeft.errors import ExamplesInvalid
from fedpeft.rounds.state_machine import ticket_id
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session
from fedpeft_server.store.rows import UpdateRow

from ..conftest import Arrays, Daemon, RawClient, StartDaemon, config, fault, filled

POISON = 3e38
EXCLUDED = run_pb2.TICKET_STATE_REFUSED


def rules(count: int, clients: int, **more: object) -> RunConfig:
    return config(rounds={"count": count, "clients": clients, **more})


async def hold(daemon: Daemon, run: str, number: int, updates: dict[RawClient, float]) -> run_pb2.Round:
    """Holds a round in which each client sends an update of one value; returns the round."""
    tasks = dict(zip(updates, await asyncio.gather(*(client.task() for client in updates)), strict=True))
    for client, value in updates.items():
        assert tasks[client].round == number
        await client.push(tasks[client].ticket, filled(value))
    await daemon.until(run, lambda found: found.version == number)
    return (await daemon.rounds(run))[number - 1]


def states(held: run_pb2.Round) -> dict[str, int]:
    return {ticket.client: ticket.state for ticket in held.tickets}


@pytest.mark.parametrize("names", [("alice", "mallory"), ("alice", "bob", "mallory")])
async def test_a_poisoned_update_of_the_first_round_is_not_folded(start: StartDaemon, names: tuple[str, ...]) -> None:
    daemon = await start(keep_updates=True)
    run = (await daemon.create(rules(2, len(names)))).id
    clients = await daemon.clients(*names)
    held = await hold(daemon, run, 1, {c: POISON if c.name == "mallory" else 0.5 for c in clients})

    assert states(held)["mallory"] == EXCLUDED
    ticket = next(t for t in held.tickets if t.client == "mallory")
    assert ticket.reason.startswith("UPDATE_EXCLUDED: its norm ")
    assert ticket.weight == 0.0
    adapter = await daemon.adapter(run, 1)
    assert all((values == 0.5).all() for values in adapter.values())

    written = json.loads(held.record)
    assert [each["client"] for each in written["excluded"]] == ["mallory"]
    assert written["excluded"][0]["reason"] == "norm"
    await hold(daemon, run, 2, {c: POISON if c.name == "mallory" else 0.5 for c in clients})
    await verify(daemon, run)


async def test_the_client_is_told_and_the_operator_sees_it(daemon: Daemon) -> None:
    run = (await daemon.create(rules(1, 2))).id
    alice, mallory = await daemon.clients("alice", "mallory")
    await hold(daemon, run, 1, {alice: 0.5, mallory: POISON})
    ticket = ticket_id(run, 1, "mallory")
    standing = await mallory.upload(ticket)
    assert standing.state == EXCLUDED
    assert standing.reason.startswith("UPDATE_EXCLUDED: ")
    assert not standing.HasField("receipt")
    again = await fault(mallory.push(ticket, filled(POISON)))
    assert again.reason == "UPDATE_EXCLUDED" and "its norm" in again.message
    counted = {c.id: c.updates for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients}
    assert counted == {"alice": 1, "mallory": 0}
    entries = await daemon.server.store.transact(daemon.server.store.db.transactions.entries_after, 0, 100)
    (entry,) = [e for e in entries if e.action == "update.excluded"]
    assert json.loads(entry.details)["client"] == "mallory"


async def test_a_large_update_is_held_against_the_rounds_before(start: StartDaemon) -> None:
    daemon = await start(keep_updates=True)
    run = (await daemon.create(rules(4, 1))).id
    (alice,) = await daemon.clients("alice")
    for number in (1, 2, 3):
        await hold(daemon, run, number, {alice: 0.5})
    first = await alice.task()
    await alice.push(first.ticket, filled(0.5 * 31))
    refused = await daemon.until(run, lambda r: "awaits replacements" in r.reason)
    assert refused.version == 3
    (bob,) = await daemon.clients("bob")
    held = await hold(daemon, run, 4, {bob: 0.5 * 29})
    assert states(held) == {"alice": EXCLUDED, "bob": run_pb2.TICKET_STATE_RECEIVED}
    await verify(daemon, run)


async def test_honest_clients_that_differ_by_a_factor_of_ten_all_count(daemon: Daemon) -> None:
    run = (await daemon.create(rules(2, 3))).id
    clients = await daemon.clients("a", "b", "c")
    for number in (1, 2):
        held = await hold(daemon, run, number, dict(zip(clients, (0.1, 0.3, 1.0), strict=True)))
        assert set(states(held).values()) == {run_pb2.TICKET_STATE_RECEIVED}
        assert json.loads(held.record)["format"] == 1


async def test_without_a_limit_what_would_leave_float32_is_excluded_by_name(start: StartDaemon) -> None:
    daemon = await start(keep_updates=True)
    run_file = config(rounds={"count": 1, "clients": 2}, aggregation={"norm_factor": 0, "server_learning_rate": 100})
    run = (await daemon.create(run_file)).id
    alice, mallory = await daemon.clients("alice", "mallory")
    held = await hold(daemon, run, 1, {alice: 0.5, mallory: POISON})
    (left_out,) = json.loads(held.record)["excluded"]
    assert (left_out["client"], left_out["reason"]) == ("mallory", "overflow")
    assert "bound" not in json.loads(held.record)
    assert "float32" in next(t.reason for t in held.tickets if t.client == "mallory")
    await verify(daemon, run)


async def test_the_verdict_outlives_a_restart_in_the_middle(start: StartDaemon, tmp_path: Path) -> None:
    """The history of norms is in the database: a restarted server judges as the first one would have."""
    records: list[list[str]] = []
    for restarts in (False, True):
        folder = tmp_path / str(restarts)
        daemon = await start(folder)
        run = (await daemon.create(rules(4, 2), request_id="same")).id
        for number in (1, 2, 3, 4):
            if restarts and number == 4:
                await daemon.end()
                daemon = await start(folder)
            alice, mallory = await daemon.clients("alice", "mallory")
            await hold(daemon, run, number, {alice: 0.5, mallory: 40.0 if number == 4 else 0.6})
        records.append([r.record.replace(run, "RUN") for r in await daemon.rounds(run)])
    assert [excluded(text) for text in records[0]] == [excluded(text) for text in records[1]]
    assert excluded(records[0][3]) == ["mallory"]


def excluded(text: str) -> list[str]:
    return [each["client"] for each in json.loads(text).get("excluded", ())]


class TestExamples:
    """A client may claim at most the examples that it declared: FedAvg weighs by them."""

    async def claim(self, daemon: Daemon, examples: int, *, answered: int = 0, registered: int = 0) -> UpdateRow | None:
        run = (await daemon.create(rules(1, 1))).id
        mallory = daemon.client("mallory")
        capabilities = fed.Capabilities(examples=registered)
        request = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER)
        request.capabilities.CopyFrom(capabilities)
        await mallory.stub.Register(request, metadata=mallory.metadata)
        await mallory.answer(run, examples=answered)
        task = await mallory.task()
        await mallory.push(task.ticket, one(), examples)
        return await daemon.server.store.transact(daemon.server.store.db.update, task.ticket)

    @pytest.mark.parametrize(
        ("declared", "most"), [({"answered": 40, "registered": 90}, 40), ({"registered": 90}, 90), ({}, 100_000)]
    )
    async def test_no_more_than_declared(self, daemon: Daemon, declared: dict[str, int], most: int) -> None:
        refused = await fault(self.claim(daemon, most + 1, **declared))
        assert isinstance(refused, ExamplesInvalid)
        assert str(most) in refused.message

    async def test_as_many_as_declared(self, daemon: Daemon) -> None:
        update = await self.claim(daemon, 10**9, answered=10**9)
        assert update is not None and update.examples == 10**9


def one() -> Arrays:
    return filled(np.float32(0.5))


async def verify(daemon: Daemon, run: str) -> None:
    spool = daemon.server.settings.data_dir / "spool"
    await verified(Session(daemon.server.settings.listen), run, spool, lambda line: None)
