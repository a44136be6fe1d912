"""Two engines drive one run on one database: each transition happens once, whoever tries."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.config import parse_config
from fedpeft.errors import FedpeftError, PayloadInvalid, RoundClosed, TicketNotFound, UpdateDiffers
from fedpeft.identity import audit
from fedpeft.rounds.commit import write_first
from fedpeft.rounds.record import verify_chain
from fedpeft.rounds.state_machine import Phase, Round, TicketState, TimePassed, ticket_id
from fedpeft_server.background import Background
from fedpeft_server.metrics import Metrics
from fedpeft_server.runs import actor, aggregation, engine
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
    Transition,
    UpdateRow,
    VersionRow,
)
from fedpeft_server.store.store import Store, version_key
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


class Clock:
    """The module `time`, as far as engines use it, with a clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (actor, engine, aggregation):
        monkeypatch.setattr(module, "time", clock)
    return clock


@dataclass
class Cluster:
    """Stores of servers that share database, versions and updates, each with a data folder of its own."""

    stores: Sequence[Store]
    clock: Clock

    @property
    def database(self) -> Any:
        return self.stores[0].db

    async def create(self) -> RunRow:
        """Writes a run, which all clients accepted, to database and blobs."""
        self.clock.now = 1_000_000.0
        run = RunRow(f"run-{secrets.token_hex(6)}", CONFIG, SPEC, "ab" * 32, RunState.RUNNING, "", 0, 1.0)
        store = self.stores[0]
        path = store.scratch / run.id
        written = write_first(run_header(run), zeros(), path)
        store.blobs.put(version_key(run.id, 0), path)
        version = VersionRow(run.id, 0, written.sha256, written.size_bytes, "", 1.0)
        await store.transact(store.db.create_run, run, version)
        await store.transact(store.db.put_answers, [AnswerRow(run.id, name, True) for name in CLIENTS])
        return run


@pytest.fixture
def cluster(tmp_path: Path, url: str, clock: Clock) -> Iterator[Cluster]:
    shared = f"file://{tmp_path / 'versions'}", f"file://{tmp_path / 'updates'}"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    stores = [Store(folder, url, *shared, keep_updates=False) for folder in folders]
    yield Cluster(stores, clock)
    for store in stores:
        store.close()


class Server:
    """One server's engine of a run, without its calls."""

    def __init__(self, store: Store, run: RunRow, current: Round) -> None:
        self.store = store
        metrics, faults = Metrics(), list[bool]()
        self.background = Background(metrics, lambda: faults.append(True))
        self.faults = faults
        participation = Participation(AnswerRow(run.id, name, True) for name in CLIENTS)
        parts = store, Lobby(lambda: None), participation, ByteCounter(metrics), metrics, self.background
        self.engine = RunEngine(run, current, *parts, lambda run, tickets: None, lambda engine: None)

    @classmethod
    async def of(cls, store: Store, run: str) -> Server:
        ((row, current),) = await store.transact(store.db.standings, run)
        server = cls(store, row, current)
        await server.engine.start()
        return server

    async def idle(self) -> None:
        """Waits until what follows from the last transitions is done."""
        for _ in range(3):
            await self.engine._folding.idle()
            await self.engine.actor.tasks.wait()

    async def close(self) -> None:
        await self.engine.close()
        await self.background.close()
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
        with store.blobs.local(version_key(run, version, stored.source)) as path, path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == stored.sha256


async def test_both_receive_both_see_the_deadline_and_both_fold_and_commit(cluster: Cluster) -> None:
    """Everything is tried by both servers at the same time, until the run is over."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    receipts: list[tuple[str, str]] = []
    for number in (1, 2, 3):
        await asyncio.gather(one.offer("ab"), two.offer("ab"))
        tickets = [one.ticket(client, number) for client in "ab"]
        updates = [server.receive("a", number, 0.5) for server in (one, two)]
        answers = await asyncio.gather(*updates, two.receive("b", number) if number == 3 else one.deadline())
        receipts += [(tickets[0], answers[0]), (tickets[0], answers[1])]
        if number < 3:
            cluster.clock.now += 1001.0
            await asyncio.gather(one.deadline(), two.deadline())
        await asyncio.gather(one.idle(), two.idle())
        await asyncio.gather(one.engine.refresh(), two.engine.refresh())
        assert {server.engine.run.version for server in (one, two)} == {number}
        assert one.engine.actor.status == two.engine.actor.status
    assert one.engine.run.state is RunState.COMPLETED
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[1], run, receipts)
    states = [[t.ticket.state for t in r.tickets] for r in shown(cluster.stores[0], run)]
    assert states == [[TicketState.RECEIVED, TicketState.LATE]] * 2 + [[TicketState.RECEIVED] * 2]


async def test_a_round_is_committed_once_where_both_fold_it_at_the_same_time(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one folds all of it, of files that the other may have removed, and finds that it is done."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    folds, both, fold = list[str](), asyncio.Barrier(2), aggregation.Folding._fold_round

    async def together(self: aggregation.Folding, folding: Round) -> Any:
        await both.wait()
        found = await fold(self, folding)
        folds.append(found.outcome.record_sha256)
        await both.wait()
        return found

    monkeypatch.setattr(aggregation.Folding, "_fold_round", together)
    await one.offer("ab")
    await two.engine.refresh()
    await one.receive("a", 1)
    await two.receive("b", 1)
    await one.engine.refresh()
    async with asyncio.timeout(20):
        await asyncio.gather(one.idle(), two.idle())
    assert len(folds) == 2 and len(set(folds)) == 1, "both folded, to the same bits"
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])
    counted = [server.engine._metrics.rounds.labels(run, "committed")._value.get() for server in (one, two)]
    assert sorted(counted) == [0.0, 1.0], "the one that committed it counts it"
    assert cluster.database.run(run).state is RunState.RUNNING, "the other one did not pause the run"


async def test_a_fold_that_finds_its_updates_removed_finds_that_it_is_done(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    done, fold = asyncio.Event(), aggregation.Folding._fold_round

    async def late(self: aggregation.Folding, folding: Round) -> Any:
        if self is two.engine._folding:
            await done.wait()
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", late)
    await one.offer("ab")
    await one.receive("a", 1)
    await one.receive("b", 1)
    await two.engine.refresh()
    assert two.engine.round.phase is Phase.AGGREGATING
    await one.idle()
    assert not list(cluster.stores[0].updates._blobs._root.rglob("ticket-*/*"))  # type: ignore[attr-defined]
    done.set()
    await two.idle()
    assert two.engine.run.state is RunState.RUNNING and two.engine.run.version == 1
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


async def test_a_rollback_ends_a_round_that_another_server_folds(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version stays what the rollback made, though the fold writes its own file afterwards."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await one.receive("a", 1)
    await one.receive("b", 1)
    await one.idle()
    begun, go, fold = asyncio.Event(), asyncio.Event(), aggregation.Folding._fold_round

    async def late(self: aggregation.Folding, folding: Round) -> Any:
        begun.set()
        await go.wait()
        return await fold(self, folding)

    monkeypatch.setattr(aggregation.Folding, "_fold_round", late)
    await one.offer("ab")
    await one.receive("a", 2)
    await one.receive("b", 2)
    await begun.wait()
    assert await two.command("roll_back", 0, "poisoned") == ""
    go.set()
    await one.idle()
    assert (one.engine.run.version, one.engine.run.state, one.engine.round.number) == (2, RunState.RUNNING, 3)
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])
    assert cluster.database.version(run, 2).source == 0


async def test_of_two_updates_of_one_ticket_one_counts_and_the_other_is_told(cluster: Cluster) -> None:
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    answers = await asyncio.gather(one.receive("a", 1, 1.0), two.receive("a", 1, 2.0))
    assert UpdateDiffers.reason in answers
    (receipt,) = [answer for answer in answers if answer != UpdateDiffers.reason]
    await asyncio.gather(one.idle(), two.idle(), one.close(), two.close())
    check(cluster.stores[0], run, [(one.ticket("a", 1), receipt)])


async def test_nothing_is_refused_by_what_one_server_remembers(cluster: Cluster) -> None:
    """The second one knows the first round alone, and neither its end nor the next one."""
    run = (await cluster.create()).id
    one, two = [await Server.of(store, run) for store in cluster.stores]
    await one.offer("ab")
    await two.engine.refresh()
    await one.receive("a", 1)
    await one.receive("b", 1)
    await one.idle()
    await one.offer("ab")
    assert (one.engine.round.number, two.engine.round.number) == (2, 1)
    assert len(await two.receive("a", 2)) == 64, "it is counted"
    assert two.engine.round.number == 2
    assert await two.receive("c", 1) == RoundClosed.reason
    assert await two.command("pause", "a while") == ""
    assert await one.command("resume") == ""
    assert await two.command("roll_back", 0, "poisoned") == ""
    assert await one.command("roll_back", 0, "poisoned") == "", "a repetition, which changes nothing"
    await asyncio.gather(one.engine.refresh(), two.engine.refresh())
    assert one.engine.actor.status == two.engine.actor.status
    assert (one.engine.run.version, one.engine.run.state) == (2, RunState.RUNNING)
    await asyncio.gather(one.close(), two.close())
    check(cluster.stores[0], run, [])


class Died(BaseException):
    """The end of a process in the middle of an instruction: nothing of it handles this."""


def dying(store: Store, at: int, *, written: bool) -> Callable[..., None]:
    """Returns a `transit` in whose call number `at` the process dies, before the transaction or right after it."""
    transit, calls = store.db.transit, iter(range(at + 1))

    def call(made: Transition, *rest: Any) -> None:
        last = next(calls, None) in (at, None)  # a process that is dead writes nothing more
        if not last or written:
            transit(made, *rest)
        if last:
            raise Died

    return call


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_server_that_dies_at_any_transition_is_followed_by_another(
    cluster: Cluster, at: int, written: bool
) -> None:
    """The clients repeat to the second server what the first one did not answer."""
    run = (await cluster.create()).id
    first, receipts = await Server.of(cluster.stores[0], run), list[tuple[str, str]]()
    cluster.stores[0].db.transit = dying(cluster.stores[0], at, written=written)  # type: ignore[method-assign]
    try:
        for number in (1, 2, 3):
            await first.offer("ab")
            for client in "ab":
                receipts.append((first.ticket(client, number), await first.receive(client, number)))
            await first.idle()
            if first.faults:  # its fold died
                break
    except (Died, asyncio.CancelledError):
        pass  # the caller of a command that died is told nothing, or that it is over
    first.engine._disarm_timer()
    cluster.clock.now += 1.0
    second = await Server.of(cluster.stores[1], run)
    for number in range(second.engine.round.number, 4):
        await second.idle()
        await second.offer("ab")
        for client in "ab":
            answer = await second.receive(client, number)
            receipts += [(second.ticket(client, number), answer)] if len(answer) == 64 else []
        await second.idle()
    await second.close()
    assert cluster.database.run(run).state is RunState.COMPLETED
    check(cluster.stores[1], run, [(ticket, answer) for ticket, answer in receipts if len(answer) == 64])
    assert [[t.ticket.state for t in r.tickets] for r in shown(cluster.stores[1], run)] == [
        [TicketState.RECEIVED] * 2
    ] * 3


# A random history, told to one server, or to two of which each hears some events, some both, at once or one after
# the other.

Step = tuple[str, str, int]
"""Event, client, and the server that hears it: 0 or 1, 2 for both one after the other, 3 for both at once."""
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("offer", "receive", "receive", "all", "withdraw", "refuse", "deadline", "pause", "resume")),
        st.sampled_from(CLIENTS),
        st.integers(0, 3),
    ),
    max_size=25,
)


async def happen(server: Server, event: str, client: str, number: int) -> str:
    """Tells a server an event of a round; returns what it answers."""
    match event:
        case "offer":
            await server.offer("".join(CLIENTS))
        case "receive":
            return await server.receive(client, number, 1.0 + CLIENTS.index(client))
        case "all":
            await server.offer("".join(CLIENTS))
            for each in server.engine.round.tickets:
                await server.receive(each.client, number, 1.0 + CLIENTS.index(each.client))
        case "withdraw":
            return await server.withdraw(client, number)
        case "refuse":
            await server.refuse(client, number)
        case "deadline":
            await server.deadline()
        case "pause":
            return await server.command("pause", "a while")
        case "resume":
            return await server.command("resume")
    return ""


async def history(cluster: Cluster, steps: Sequence[Step], hearing: Callable[[int], Sequence[int]]) -> dict[str, Any]:
    """Drives a run through a history; returns what became of it."""
    run = (await cluster.create()).id
    servers = [await Server.of(store, run) for store in cluster.stores]
    receipts: list[tuple[str, str]] = []
    for event, client, who in steps:
        number = cluster.database.standings(run)[0][1].number
        if event == "deadline":
            cluster.clock.now += 1001.0
        # Several events in a row are no event of one round: the other server might go on to the next one meanwhile.
        hear = [servers[index] for index in hearing(who % 2 if event == "all" else who)]
        if len(hear) == 2 and who == 3:
            answers = list(await asyncio.gather(*(happen(server, event, client, number) for server in hear)))
        else:
            answers = [await happen(server, event, client, number) for server in hear]
        if event == "receive":
            receipts += [(servers[0].ticket(client, number), answer) for answer in answers if len(answer) == 64]
        await asyncio.gather(*(server.idle() for server in servers))
    await asyncio.gather(*(server.close() for server in servers))
    check(cluster.stores[0], run, receipts)
    ((row, current),) = cluster.database.standings(run)
    return {
        "run": (row.state, row.reason, row.version),
        "round": (current.number, current.phase, current.extensions, current.deadline),
        "tickets": [
            [
                (t.ticket.client, t.ticket.state, t.ticket.reason, t.weight, t.payload_sha256)
                for t in shown_round.tickets
            ]
            for shown_round in shown(cluster.stores[0], run)
        ],
        "conducts": cluster.database.conducts(run),
    }


@given(steps=STEPS)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_any_history_ends_for_two_servers_as_for_one(cluster: Cluster, steps: list[Step]) -> None:
    async def compared() -> tuple[dict[str, Any], dict[str, Any]]:
        alone = await history(cluster, [(event, client, 0) for event, client, _ in steps], lambda _: (0,))
        return alone, await history(cluster, steps, lambda who: (who,) if who < 2 else (0, 1))

    alone, together = asyncio.run(compared())
    assert together == alone
