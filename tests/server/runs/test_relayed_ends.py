"""The end of an edge's run: it is completed with the parent's last version, and says where that is another one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.rounds import record
from fedpeft.rounds.events import Aggregated, Paused, Stopped, Supplied, TimePassed, Waiting
from fedpeft.rounds.state_machine import Phase, Round
from fedpeft.rounds.transitions import RunState, RunStatus, transition
from fedpeft.rpc import wire
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.relay.worker import RelayWorker
from fedpeft_operator.cli.run.verify import verified
from fedpeft_operator.cli.session import Session
from fedpeft_server.commands import check

from ..conftest import SPEC, Daemon, StartDaemon, answered, refused, zeros
from ..relayed_calls import RUN, committed, edges, make, ones, sum_of, supply, train


async def differences(daemon: Daemon) -> list[int]:
    """Returns the versions of which the audit log says that the parent's are others."""
    entries = await daemon.server.store.transact(daemon.server.store.db.transactions.entries_after, 0, 1000)
    return [json.loads(entry.details)["version"] for entry in entries if entry.action == "version.differs"]


@pytest.mark.parametrize("rounds", [1, 2])
async def test_a_run_ends_with_the_last_version_of_the_parents(start: StartDaemon, tmp_path: Path, rounds: int) -> None:
    """Its own rounds make all versions of the parent but that one; it need not have had a part in the last rounds."""
    folder, last = tmp_path / "edge", {name: values + 1 for name, values in zeros().items()}
    edge = await start(folder)
    await make(edge, 0, zeros(), made=edges(count=2))
    clients = list(enumerate(await edge.clients("a", "b")))
    await train(clients, 1)
    await committed(edge, 1)
    if rounds == 2:
        await supply(edge, 1, zeros())
        await train(clients, 2)
        await committed(edge, 2)
        waits = await edge.run(RUN)
        assert (waits.state, waits.version) == (run_pb2.RUN_STATE_RUNNING, 1)
        assert waits.reason == f"{RUN} waits for the last version of the parent's server"
        kept = await sum_of(edge, 2)
        await edge.end()
        edge = await start(folder)
        assert (await edge.run(RUN)).reason == waits.reason and await sum_of(edge, 2) == kept
    run = await supply(edge, 2, last)
    assert (run.state, run.version, run.reason) == (run_pb2.RUN_STATE_COMPLETED, 2, "")
    assert (await supply(edge, 2, last)).version == 2
    assert await refused(supply(edge, 3, last)) == "RUN_FINISHED"
    await edge.end()
    again = await start(folder)
    assert (await again.run(RUN)).version == 2
    assert [each.number for each in await again.rounds(RUN) if each.record] == list(range(1, rounds + 1))
    given = await again.adapter(RUN, 2)
    assert all(np.array_equal(given[name], last[name]) for name in last)
    lines: list[str] = []
    assert len((await verified(Session(again.server.settings.listen), RUN, None, lines.append))["rounds"]) == rounds
    await again.end()
    assert await asyncio.to_thread(check.main, ["--data-dir", str(folder)]) == 0


@pytest.mark.parametrize("paused", [False, True])
async def test_a_run_that_waits_for_the_last_version_can_be_paused_and_stopped(
    start: StartDaemon, tmp_path: Path, paused: bool
) -> None:
    """As where the parent's round never closes: its run is over when it has the result, and not before."""
    edge = await start(tmp_path / "edge", keep_updates=True)
    await make(edge, 0, zeros(), made=edges(count=1))
    await train(list(enumerate(await edge.clients("a", "b"))), 1)
    await committed(edge, 1)
    if paused:
        assert (await edge.operator.PauseRun(op.PauseRunRequest(run=RUN))).run.state == run_pb2.RUN_STATE_PAUSED
        assert await sum_of(edge, 1), "the agent may still fetch it"
        assert (await edge.operator.ResumeRun(op.ResumeRunRequest(run=RUN))).run.state == run_pb2.RUN_STATE_RUNNING
    stopped = (await edge.operator.StopRun(op.StopRunRequest(run=RUN, reason="the edge leaves"))).run
    assert (stopped.state, stopped.version) == (run_pb2.RUN_STATE_STOPPED, 0)
    (round_,) = await edge.rounds(RUN)
    assert round_.record and round_.phase == run_pb2.ROUND_PHASE_COMMITTED
    spool = edge.server.settings.data_dir / "spool"
    await verified(Session(edge.server.settings.listen), RUN, spool, [].append)  # with the updates, which are kept
    assert await refused(supply(edge, 1, zeros())) == "RUN_FINISHED"
    await edge.end()
    assert await asyncio.to_thread(check.main, ["--data-dir", str(tmp_path / "edge")]) == 0


async def test_a_version_that_the_parent_made_again_pauses_the_run(daemon: Daemon) -> None:
    await make(daemon, 0, zeros())
    await daemon.operator.StopRun(op.StopRunRequest(run=(await make(daemon, 0, zeros(), "run-b")).id, reason="enough"))
    for run in (RUN, "run-b"):
        for _ in range(2):  # a repetition is no news
            assert await refused(supply(daemon, 0, ones(), run)) == "VERSION_DIFFERS"
    paused, stopped = await daemon.run(RUN), await daemon.run("run-b")
    assert paused.state == run_pb2.RUN_STATE_PAUSED and stopped.reason == "enough"
    assert "another version 0 than the parent's server" in paused.reason and "it is created anew" in paused.reason
    assert await differences(daemon) == [0]


async def test_a_run_that_is_over_says_so_where_the_parents_last_version_is_another_one(
    daemon: Daemon, tmp_path: Path
) -> None:
    """The parent was restored from a backup and went on, while the edge has the run completed."""
    await make(daemon, 2, zeros())
    assert (await supply(daemon, 3, zeros())).state == run_pb2.RUN_STATE_COMPLETED
    relay = RelayOptions(daemon.server.settings.listen, "north", 2).as_json()
    agent = RelayWorker({"relay": relay, "policy": {}})
    manifest, data = payload.encode(ones(), SPEC.shared, "float32")
    (tmp_path / "adapter").write_bytes(data)
    described = json_format.MessageToDict(wire.manifest_to_proto(manifest))
    adapter = {"payload": str(tmp_path / "adapter"), "manifest": described}
    over = {"op": "finished", "run": {"id": RUN}, "how": "completed", "adapter": adapter}
    with capture_logs() as lines:
        assert await agent.finished(over) == {"done": True}
        assert await agent.finished(over) == {"done": True}
    found = await daemon.run(RUN)
    assert (found.state, found.version) == (run_pb2.RUN_STATE_COMPLETED, 3)
    assert f"{RUN} has another version 3 than the parent's server" in found.reason
    assert "export it there, and delete the run at the edge" in found.reason
    assert [line["reason"] for line in lines if "last version is not" in line["event"]] == 2 * ["VERSION_DIFFERS"]
    assert await differences(daemon) == [3]
    given = await daemon.adapter(RUN, 3)
    assert not any(values.any() for values in given.values()), "nothing is replaced"


def test_a_run_is_over_with_the_last_version_and_not_with_its_last_sum() -> None:
    rounds = edges(count=5).rounds
    folding = RunStatus(5, RunState.RUNNING, "", 4, Round(RUN, 5, Phase.AGGREGATING))
    made = transition(folding, [Aggregated()], rounds, 0.0)
    assert made and (made.after.state, made.after.version, made.after.awaited_version) == (RunState.RUNNING, 4, 5)
    waits = made.after
    assert waits.round is made.round, "there is no round after it"
    assert transition(waits, [Waiting(frozenset("ab"))], rounds, 0.0) is None
    assert transition(waits, [TimePassed()], rounds, 1e12) is None
    for event, state in ((Paused("the owner asked"), RunState.PAUSED), (Stopped("enough"), RunState.STOPPED)):
        done = transition(waits, [event], rounds, 0.0)
        assert done and done.after.state is state and done.after.round == waits.round
    for before in (waits, transition(waits, [Paused("the owner asked")], rounds, 0.0).after):  # type: ignore[union-attr]
        over = transition(before, [Supplied(5)], rounds, 0.0)
        assert over and (over.after.state, over.after.version) == (RunState.COMPLETED, 5)
        assert over.after.round == waits.round and over.after.awaited_version is None


async def test_a_version_that_is_none_of_the_runs_is_refused(daemon: Daemon) -> None:
    await make(daemon, 0, zeros(), made=edges(count=3))
    for version in (4, 1_000_000_000, 2**32 - 1):
        assert await refused(supply(daemon, version, zeros())) == "VERSION_NOT_FOUND"
    run = await daemon.run(RUN)
    assert (run.state, run.version) == (run_pb2.RUN_STATE_RUNNING, 0)
    assert (await supply(daemon, 3, zeros())).state == run_pb2.RUN_STATE_COMPLETED


async def test_a_version_that_comes_too_late_is_refused_before_its_payload(daemon: Daemon) -> None:
    await make(daemon, 1, zeros())
    async with asyncio.timeout(5):
        assert await refused(announced(daemon, 0)) == "VERSION_SUPERSEDED"
        assert await refused(announced(daemon, 4)) == "VERSION_NOT_FOUND"
        await daemon.operator.StopRun(op.StopRunRequest(run=RUN))
        assert await refused(announced(daemon, 2)) == "RUN_FINISHED"


async def test_the_record_of_a_sum_is_read_beside_the_event_loop(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a round of 100,000 clients has 16 MB."""
    await make(daemon, 0, zeros())
    await train(list(enumerate(await daemon.clients("a", "b"))), 1)
    await committed(daemon, 1)
    parse, threads = record.parse, list[threading.Thread]()

    def noted(text: str) -> record.Record:
        threads.append(threading.current_thread())
        return parse(text)

    monkeypatch.setattr(record, "parse", noted)
    assert (await sum_of(daemon, 1))[0].metrics["updates"] == 2
    assert threads and threading.main_thread() not in threads


async def announced(edge: Daemon, version: int) -> op.SupplyVersionResponse:
    """Says that a version comes, and sends no byte of it."""
    manifest, _ = payload.encode(zeros(), SPEC.shared, "float32")

    async def requests() -> AsyncIterator[op.SupplyVersionRequest]:
        described = wire.manifest_to_proto(manifest)
        header = op.SupplyVersionHeader(run=RUN, version=version, manifest=described, client="north")
        yield op.SupplyVersionRequest(header=header)
        await asyncio.Event().wait()

    return await answered(edge.operator.SupplyVersion(requests()))
