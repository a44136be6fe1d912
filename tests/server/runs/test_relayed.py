"""An edge: a run whose rounds make sums for a parent's server, driven here as an edge's agent drives it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import ConfigInvalid, RunFinished, RunNotRelayed, RunRelayed, VersionDiffers, VersionSuperseded
from fedpeft.rounds.events import Paused, Resumed, RolledBack, Supplied, TimePassed, Waiting
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.tickets import TicketState
from fedpeft.rounds.transitions import RunState, RunStatus, transition
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session
from fedpeft_server.commands import check
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.store.store import sum_key

from ..conftest import SPEC, Daemon, StartDaemon, config, refused, zeros
from ..relayed_calls import EXACT, RUN, committed, edges, make, parents, sum_of, supply, train, update


async def test_two_edges_give_the_bits_of_one_flat_federation(start: StartDaemon, tmp_path: Path) -> None:
    """Two edges of two and three clients, and one client of the parent's own, against six clients of one server."""
    names = ("flat", "parent", "north", "south")
    flat, parent, north, south = [await start(tmp_path / name, keep_updates=True) for name in names]
    straight = (await flat.create(parents(clients=6))).id
    run = (await parent.create(parents(clients=3))).id
    all_of_them = list(enumerate(await flat.clients("c0", "c1", "c2", "c3", "c4", "c5")))
    agents = await parent.clients("north", "south")
    (own,) = await parent.clients("c5")
    members = {
        north: list(enumerate(await north.clients("c0", "c1"))),
        south: [(i + 2, client) for i, client in enumerate(await south.clients("c2", "c3", "c4"))],
    }
    for number in (1, 2, 3):
        await train(all_of_them, number)
        await flat.until(straight, lambda found, number=number: found.version == number)
        base = await parent.adapter(run, number - 1)
        *tasks, task_of_own = await asyncio.gather(*(each.task() for each in (*agents, own)))
        for agent, task, (edge, clients) in zip(agents, tasks, members.items(), strict=True):
            if number == 1:
                await make(edge, 0, base, run, edges(clients=len(clients)))
            else:
                await supply(edge, number - 1, base, run)
            await train(clients, number)
            await committed(edge, number, run)
            header, data = await sum_of(edge, number, run)
            assert header.metrics["updates"] == len(clients)
            assert hashlib.sha256(data).digest() == header.manifest.sha256
            first = fed.UpdateHeader(ticket=task.ticket, manifest=header.manifest, examples=header.examples)
            await agent.push_raw(first, [(0, data)])
        await own.push(task_of_own.ticket, update(5, number), examples=15)
        await parent.until(run, lambda found, number=number: found.version == number)
        ours, theirs = await parent.adapter(run, number), await flat.adapter(straight, number)
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), f"round {number}"
    for daemon, of in ((parent, run), (flat, straight), (north, run), (south, run)):
        lines: list[str] = []
        spool = daemon.server.settings.data_dir / "spool"
        await verified(Session(daemon.server.settings.listen), of, spool, lines.append)
        assert len(lines) == 3
    assert (await north.run(run)).state == run_pb2.RUN_STATE_RUNNING
    assert (await supply(north, 3, await parent.adapter(run, 3), run)).state == run_pb2.RUN_STATE_COMPLETED
    records = [json.loads(each.record) for each in await parent.rounds(run)]
    sums = [json.loads(each.record)["sum_sha256"] for each in await north.rounds(run)]
    assert sums == [record["contributions"][1]["sha256"] for record in records], "the records name each other"


async def test_rounds_that_the_parent_held_without_the_edge_do_not_exist_here(daemon: Daemon) -> None:
    clients = list(enumerate(await daemon.clients("a", "b")))
    made = await make(daemon, 3, zeros(), made=edges(count=9))
    assert made.version == 3 and made.id == RUN
    await train(clients, 4)
    await committed(daemon, 4)
    assert "waits for version 4 of the parent's server" in (await daemon.run(RUN)).reason
    await supply(daemon, 6, zeros())
    await train(clients, 7)
    await committed(daemon, 7)
    assert [(each.number, bool(each.record)) for each in await daemon.rounds(RUN)] == [(4, True), (7, True), (8, False)]
    lines: list[str] = []
    await verified(Session(daemon.server.settings.listen), RUN, None, lines.append)
    assert len(lines) == 2
    assert await refused(sum_of(daemon, 4)) == "SUM_NOT_FOUND"
    assert await refused(supply(daemon, 5, zeros())) == "VERSION_SUPERSEDED"
    header, data = await sum_of(daemon, 7)
    assert (await sum_of(daemon, 7, offset=40))[1] == data[40:]
    assert (await supply(daemon, 6, zeros())).version == 6, "a repetition changes nothing"
    assert (await sum_of(daemon, 7)) == (header, data)


async def test_a_round_that_is_not_over_goes_with_what_had_come_for_it(daemon: Daemon) -> None:
    a, b = await daemon.clients("a", "b")
    await make(daemon, 0, zeros(), made=edges(count=9))
    early, late = await asyncio.gather(a.task(), b.task())
    await a.push(early.ticket, update(0, 1))
    await supply(daemon, 2, zeros())
    assert await refused(b.push(late.ticket, update(1, 1))) == "ROUND_CLOSED"
    standing = await b.upload(late.ticket)
    assert "version 2 of the parent's run came before round 1 was over" in standing.reason
    await train([(0, a), (1, b)], 3)
    await committed(daemon, 3)
    assert await refused(sum_of(daemon, 1)) == "SUM_NOT_FOUND"


async def test_a_version_is_known_by_its_content_too(start: StartDaemon, tmp_path: Path) -> None:
    """A parent that was restored from a backup makes a version of the same number again, of other updates."""
    folder, again = tmp_path / "edge", {name: values + 1 for name, values in zeros().items()}
    first = await start(folder)
    await make(first, 0, zeros(), made=edges(count=9))
    clients = list(enumerate(await first.clients("a", "b")))
    assert await refused(supply(first, 0, again)) == "VERSION_DIFFERS"
    assert (await first.run(RUN)).state == run_pb2.RUN_STATE_PAUSED
    await first.operator.ResumeRun(op.ResumeRunRequest(run=RUN))
    await train(clients, 1)
    await committed(first, 1)
    await supply(first, 1, zeros())
    await train(clients, 2)
    await committed(first, 2)
    kept = await sum_of(first, 2)
    await first.end()
    second = await start(folder)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await supply(second, 1, again)
    assert "stop and delete the run at the edge" in str(caught.value.details())
    assert (await supply(second, 1, zeros())).version == 1
    assert await sum_of(second, 2) == kept, "a refusal changes nothing"
    await supply(second, 2, again)
    assert await refused(supply(second, 2, zeros())) == "VERSION_DIFFERS"


async def test_a_run_is_relayed_for_one_client_of_the_parent(start: StartDaemon, tmp_path: Path) -> None:
    """Two agents of one edge would each send the same sum, and each would be counted."""
    first = await start(tmp_path / "edge")
    await make(first, 0, zeros())
    await first.end()
    daemon = await start(tmp_path / "edge")
    for version in (0, 1):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await supply(daemon, version, zeros(), client="north-2")
        assert "is relayed for client north of the parent's server, and not for 'north-2'" in str(
            caught.value.details()
        )
    assert (await daemon.run(RUN)).version == 0
    assert (await supply(daemon, 1, zeros())).version == 1


async def test_a_creation_that_comes_too_late_leaves_the_run_as_it_is(daemon: Daemon) -> None:
    """Two agents of an edge, or one beside an ordinary run: a refused creation once removed the files of the run."""
    made = await asyncio.gather(
        *(make(daemon, 0, zeros(), made=edges(count=count)) for count in (3, 4)), return_exceptions=True
    )
    (run,) = [each for each in made if isinstance(each, run_pb2.Run)]
    clients = list(enumerate(await daemon.clients("a", "b")))
    await train(clients, 1)
    await committed(daemon, 1)
    kept = await sum_of(daemon, 1)
    assert await refused(make(daemon, 1, zeros())) == "REQUEST_ID_REUSED"
    assert (await daemon.adapter(RUN, 0)).keys() == zeros().keys() and await sum_of(daemon, 1) == kept
    assert (await daemon.run(RUN)).config.rounds.count == run.config.rounds.count
    own = (await daemon.create(parents(), request_id="own")).id
    assert await refused(make(daemon, 0, zeros(), own)) == "REQUEST_ID_REUSED"
    assert (await daemon.adapter(own, 0)).keys() == zeros().keys()


async def test_a_version_that_is_here_is_not_sent_again(daemon: Daemon) -> None:
    """The server answers a client that has begun to send 64 MiB of it."""
    spec = AdapterSpec.of("bias", [TensorSpec("a", (2**24,))])
    there, other = ({"a": np.full(2**24, value, np.float32)} for value in (1.0, 2.0))
    sent: list[int] = []
    async with OperatorClient(daemon.server.settings.listen) as relay:
        await relay.create_run(edges(), spec, "ab" * 32, there, 2**24, relays=op.Relay(run=RUN, version=1, client="a"))
        first, second = (op.Relay(run=RUN, version=version, client="a") for version in (1, 2))
        run = await relay.supply_version(first, spec, there, progress=lambda done, _: sent.append(done))
        assert run.version == 1
        assert max(sent) < 2**26
        with pytest.raises(VersionDiffers):
            await relay.supply_version(first, spec, other)
        assert (await relay.supply_version(second, spec, other)).version == 2


async def test_a_restart_goes_on_where_it_stood(start: StartDaemon, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    first = await start(folder)
    await make(first, 3, zeros(), made=edges(count=9))
    await train(list(enumerate(await first.clients("a", "b"))), 4)
    await committed(first, 4)
    kept = await sum_of(first, 4)
    await first.end()
    second = await start(folder)
    assert await sum_of(second, 4) == kept
    assert (await second.run(RUN)).version == 3
    await supply(second, 7, zeros())
    await second.end()
    third = await start(folder)
    await train(list(enumerate(await third.clients("a", "b"))), 8)
    await committed(third, 8)


async def test_an_edge_that_comes_to_a_run_late_is_sound_before_its_first_sum(
    start: StartDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = await start(tmp_path / "edge")
    await make(edge, 18, zeros(), made=edges(count=40))
    lines: list[str] = []
    assert (await verified(Session(edge.server.settings.listen), RUN, None, lines.append))["rounds"] == []
    await edge.end()
    assert await asyncio.to_thread(check.main, ["--data-dir", str(tmp_path / "edge")]) == 0, capsys.readouterr().out


async def test_what_does_not_go_with_a_parent_is_refused(daemon: Daemon) -> None:
    own = (await daemon.create(parents())).id
    assert await refused(supply(daemon, 1, zeros(), own)) == "RUN_NOT_RELAYED"
    assert await refused(sum_of(daemon, 1, own)) == "RUN_NOT_RELAYED"
    assert await refused(supply(daemon, 1, zeros(), "run-nothing")) == "RUN_NOT_FOUND"
    assert await refused(make(daemon, 0, zeros(), made=parents())) == "CONFIG_INVALID"
    assert await refused(daemon.create(edges(), request_id="e")) == "CONFIG_INVALID"
    assert await refused(make(daemon, 3, zeros())) == "CONFIG_INVALID"
    assert await refused(make(daemon, 0, zeros(), "run with spaces")) == "CONFIG_INVALID"
    await make(daemon, 1, zeros())
    assert await refused(make(daemon, 0, zeros())) == "REQUEST_ID_REUSED"
    assert (await make(daemon, 1, zeros())).version == 1, "a repetition of the request has its answer"
    assert await refused(daemon.operator.RollbackRun(op.RollbackRunRequest(run=RUN, version=0))) == "RUN_RELAYED"
    assert await refused(sum_of(daemon, 2)) == "SUM_NOT_FOUND"


async def test_of_two_who_make_an_edges_run_at_once_one_is_refused(daemon: Daemon, tmp_path: Path) -> None:
    """Also where both have looked before either has made it."""
    store, both = daemon.server.store, asyncio.Barrier(2)
    create = daemon.server.runs.create

    async def together(*args: Any) -> RunEngine:
        await both.wait()
        return await create(*args)

    daemon.server.runs.create = together  # type: ignore[method-assign]
    one, other = await asyncio.gather(make(daemon, 1, zeros()), make(daemon, 0, zeros()), return_exceptions=True)
    (made,) = [each for each in (one, other) if isinstance(each, run_pb2.Run)]
    (error,) = [each for each in (one, other) if isinstance(each, grpc.aio.AioRpcError)]
    assert "already" in str(error.details())
    assert (await daemon.adapter(RUN, made.version)).keys() == zeros().keys()
    assert len(list((tmp_path / "data" / "blobs" / "runs" / RUN / "versions").iterdir())) == 1
    assert not list(store.spool.tickets())


async def test_a_supply_whose_caller_leaves_goes_to_its_end(daemon: Daemon) -> None:
    """Its upload stays for as long: else the version's file would be reported as lost."""
    await make(daemon, 0, zeros())
    store, busy, go_on = daemon.server.store, asyncio.Event(), asyncio.Event()
    version = store.version

    async def slow(function: Any, *args: Any) -> Any:
        busy.set()
        await go_on.wait()
        return await version(function, *args)

    store.version = slow  # type: ignore[method-assign]
    call = asyncio.ensure_future(supply(daemon, 1, zeros()))
    await busy.wait()
    call.cancel()
    await asyncio.wait([call])
    await asyncio.sleep(0.1)  # a removal of the upload would run now
    go_on.set()
    assert (await daemon.until(RUN, lambda run: run.version == 1)).state == run_pb2.RUN_STATE_RUNNING
    value = daemon.server.metrics.registry.get_sample_value("fedpeft_corrupt_files_total", {"kind": "update"})
    assert not value


async def test_a_version_that_is_lost_at_an_edge_comes_from_the_parent(daemon: Daemon, tmp_path: Path) -> None:
    await make(daemon, 1, zeros())
    (file,) = (tmp_path / "data" / "blobs" / "runs" / RUN / "versions").iterdir()
    file.unlink()
    assert await refused(daemon.adapter(RUN, 1)) == "BLOB_CORRUPT"
    paused = await daemon.run(RUN)
    assert "stop and delete the run, which the agent creates anew" in paused.reason and "roll" not in paused.reason


async def test_of_sums_those_that_the_parent_has_counted_go(daemon: Daemon, tmp_path: Path) -> None:
    await make(daemon, 0, zeros(), made=edges(count=9))
    store = daemon.server.store
    for number in (1, 2, 3, 10):
        store.blobs.put(sum_key(RUN, number, "ab" * 32), b"sum")
    await asyncio.to_thread(store.forget_sums, RUN, 2)
    left = sorted(path.name for path in (tmp_path / "data" / "blobs" / "runs" / RUN / "sums").iterdir())
    assert left == [f"{number}-{'ab' * 8}.sum128" for number in ("000003", "000010")]


async def test_a_sum_is_taken_where_the_run_adds_up_exactly_alone(daemon: Daemon) -> None:
    plain = (await daemon.create(config())).id
    (client,) = await daemon.clients("a")
    await daemon.clients("b")
    (other,) = await daemon.clients("b")
    task, _ = await asyncio.gather(client.task(plain), other.task(plain))
    pushed = client.push(task.ticket, update(0, 1), encoding="sum128")
    assert await refused(pushed) == "MANIFEST_INVALID"


def status(number: int, version: int, **facts: object) -> RunStatus:
    return RunStatus(5, RunState.RUNNING, "", version, Round(RUN, number, **facts))  # type: ignore[arg-type]


def test_a_round_opens_once_its_version_is_there() -> None:
    rounds = edges(count=9, clients=1).rounds
    waits = status(5, 3)
    assert waits.awaited_version == 4
    there = Waiting(frozenset("ab"), {}, 0.0)
    assert transition(waits, [there], rounds, 0.0) is None
    assert transition(waits, [TimePassed()], rounds, 1e12) is None
    supplied = transition(waits, [Supplied(4)], rounds, 0.0)
    assert supplied and supplied.after.round.number == 5 and supplied.after.awaited_version is None
    opened = transition(supplied.after, [there], rounds, 0.0)
    assert opened and opened.after.round.phase is Phase.OPEN
    over = transition(opened.after, [Supplied(7)], rounds, 0.0)
    assert over and over.round.stopped and over.after.round == Round(RUN, 8)
    assert {ticket.state for ticket in over.round.tickets} == {TicketState.LATE}
    last = transition(over.after, [Supplied(9)], rounds, 0.0)
    assert last and last.after.state is RunState.COMPLETED and last.after.round == Round(RUN, 9)


def test_supplies_are_judged_by_the_newest_version() -> None:
    rounds = edges(count=9).rounds
    assert transition(status(5, 4), [Supplied(4)], rounds, 0.0) is None
    with pytest.raises(VersionSuperseded, match="has version 4 by now; version 3 comes too late"):
        transition(status(5, 4), [Supplied(3)], rounds, 0.0)
    with pytest.raises(RunRelayed):
        transition(status(5, 4), [RolledBack(1)], rounds, 0.0)
    with pytest.raises(RunNotRelayed):
        transition(status(5, 4), [Supplied(6)], parents().rounds, 0.0)
    with pytest.raises(RunFinished):
        transition(RunStatus(1, RunState.STOPPED, "", 4, Round(RUN, 5)), [Supplied(6)], rounds, 0.0)


def test_a_paused_run_takes_a_version_and_stays_paused() -> None:
    rounds = edges(count=9).rounds
    paused = transition(status(5, 4), [Paused("the owner asked")], rounds, 0.0)
    assert paused
    supplied = transition(paused.after, [Supplied(6)], rounds, 0.0)
    assert supplied and supplied.after.state is RunState.PAUSED and supplied.after.round.number == 7
    resumed = transition(supplied.after, [Resumed()], rounds, 0.0)
    assert resumed and resumed.after.state is RunState.RUNNING


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"aggregation": {"strategy": "median", "exact_sum": True}}, "aggregation.exact_sum"),
        ({"aggregation": {"strategy": "fedbuff", "exact_sum": True}}, "aggregation.exact_sum"),
        ({"aggregation": EXACT, "rounds": {"clients": 2, "policy": "buffered"}}, "aggregation.exact_sum"),
        ({"rounds": {"clients": 2, "policy": "relayed"}}, "aggregation.exact_sum"),
        ({"aggregation": EXACT, "codec": {"up": "sum128"}}, "codec.up"),
        ({"aggregation": EXACT, "codec": {"down": "sum128"}}, "codec.down"),
    ],
)
async def test_a_run_that_cannot_be_exact_is_refused(
    daemon: Daemon, sections: Mapping[str, dict[str, object]], field: str
) -> None:
    try:
        made = config(**sections)
    except ConfigInvalid as error:
        assert field in error.message
        return
    with pytest.raises(Exception) as caught:
        await daemon.create(made)
    assert field in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_any_grouping_gives_the_same_sum(parts: list[int]) -> None:
    """Contributions of six clients, put together in up to four groups, by the fold of a round itself."""
    from fedpeft.aggregation import UpdateFacts, strategy
    from fedpeft.rounds.folding.contributions import Contribution, sum_manifest
    from fedpeft.rounds.folding.fold import fold_sums, fold_tensors

    rule, specs = strategy("fedavg", {}), SPEC.sent(1)

    def contribution(client: int) -> Contribution:
        manifest, data = payload.encode(update(client, 1), specs, "float32")
        return Contribution(f"c{client}", UpdateFacts(10 + client), manifest, memoryview(data))

    def folded(contributions: list[Contribution]) -> list[bytes]:
        tensors = fold_tensors(contributions, specs, rule, zeros(), {}, exact=True)
        return [tensor.values.tobytes() for tensor in tensors]

    grouped = []
    for group in sorted(set(parts)):
        members = [contribution(client) for client, part in enumerate(parts) if part == group]
        data = b"".join(fold_sums(members, specs, rule))
        manifest = sum_manifest(specs, hashlib.sha256(data).digest())
        examples = sum(member.facts.examples for member in members)
        grouped.append(Contribution(f"g{group}", UpdateFacts(examples), manifest, memoryview(data)))
    assert folded(grouped) == folded([contribution(client) for client in range(6)])


async def test_the_largest_epsilon_that_a_client_spent_goes_with_the_sum(daemon: Daemon) -> None:
    """As with `mechanism = "example"`, where clients count for themselves: the parent must not take it for none."""
    noise = {"mechanism": "example", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}
    rounds = {"count": 3, "clients": 2, "quorum": 2, "policy": "relayed"}
    await make(daemon, 0, zeros(), made=config(rounds=rounds, aggregation=EXACT, privacy=noise))
    clients = await daemon.clients("a", "b")
    for client, task, spent in zip(
        clients, await asyncio.gather(*(c.task() for c in clients)), (2.5, 1.5), strict=True
    ):
        manifest, data = payload.encode(update(0, 1), SPEC.sent(1), "float32")
        described = wire.manifest_to_proto(manifest)
        figures = {"privacy_epsilon": spent}
        first = fed.UpdateHeader(ticket=task.ticket, manifest=described, examples=10, metrics=figures)
        await client.push_raw(first, [(0, data)])
    await committed(daemon, 1)
    header, _ = await sum_of(daemon, 1)
    assert dict(header.metrics) == {"updates": 2.0, "privacy_epsilon": 2.5}
