"""Quorum, deadline, extension, replacement, pause: the rounds that do not go smoothly."""

from __future__ import annotations

import asyncio
import time

import pytest

from fedpeft.rounds import state_machine as rounds
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2

from ..conftest import Daemon, StartDaemon, config, filled, refused


async def test_a_deadline_with_a_quorum_commits_without_the_straggler(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 1, "deadline_s": 0.6}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    (done,) = await daemon.rounds(run.id)
    assert [(t.client, t.state) for t in done.tickets] == [
        ("a", run_pb2.TICKET_STATE_RECEIVED),
        ("b", run_pb2.TICKET_STATE_LATE),
    ]


async def test_without_a_quorum_the_round_is_extended_with_replacements_and_keeps_what_it_has(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 2, "deadline_s": 0.6}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    (c,) = await daemon.clients("c")
    replacement = await c.task()
    assert replacement.round == 1
    await c.push(replacement.ticket, filled(3.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    assert all((x == 2.0).all() for x in (await daemon.adapter(run.id, 1)).values())
    (done,) = await daemon.rounds(run.id)
    assert done.extensions == 1
    assert await refused(b.push(tasks[1].ticket, filled(1.0))) == "ROUND_CLOSED"


async def test_after_the_last_extension_the_run_is_paused_by_name_and_can_be_resumed(daemon: Daemon) -> None:
    rounds = {"count": 1, "clients": 1, "deadline_s": 0.3, "max_extensions": 1}
    run = await daemon.create(config(rounds=rounds))
    (a,) = await daemon.clients("sleepy")
    task = await a.task()
    paused = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    assert "still awaited: sleepy" in paused.reason
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))
    await a.push(task.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)


@pytest.mark.timed(waiting_look_s=0.2)
async def test_a_round_that_nobody_comes_to_pauses_its_run_by_name_and_opens_once_resumed(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "wait_s": 1.0}))
    await daemon.until(run.id, lambda r: "in 1 s the run is paused if no more come" in r.reason)
    paused = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    assert paused.reason == "round 1 needs 1 client to open, and fewer were there at the end of 1 s"
    (a,) = await daemon.clients("a")
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))
    await a.push((await a.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)


async def test_a_pause_by_hand_stops_the_deadline_and_uses_up_no_extension(daemon: Daemon) -> None:
    rounds = {"count": 1, "clients": 1, "deadline_s": 0.4, "max_extensions": 0}
    run = await daemon.create(config(rounds=rounds))
    (a,) = await daemon.clients("a")
    task = await a.task()
    await daemon.operator.PauseRun(op.PauseRunRequest(run=run.id, reason="a look at the data"))
    await asyncio.sleep(0.6)
    assert (await daemon.run(run.id)).reason == "a look at the data", "no deadline passed meanwhile"
    (current,) = await daemon.rounds(run.id)
    assert not current.HasField("deadline") and current.extensions == 0
    await daemon.operator.ResumeRun(op.ResumeRunRequest(run=run.id))
    (current,) = await daemon.rounds(run.id)
    assert current.deadline.ToSeconds() >= time.time() - 1
    await a.push(task.ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)


async def test_a_withdrawn_ticket_goes_to_another_client(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    assert (await a.withdraw(task.ticket, "no data today")).state == run_pb2.TICKET_STATE_WITHDRAWN
    assert await refused(a.push(task.ticket, filled(1.0))) == "TICKET_CLOSED"
    (b,) = await daemon.clients("b")
    await b.push((await b.task()).ticket, filled(2.0))
    await daemon.until(run.id, lambda r: r.version == 1)
    (done,) = await daemon.rounds(run.id)
    assert done.tickets[0].reason == "no data today"


@pytest.mark.timed(waiting_look_s=0.2)
async def test_operators_are_told_why_a_ticket_was_given_back_and_clients_are_not(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.2)
    rounds = {"count": 1, "clients": 2, "quorum": 2, "deadline_s": 1.5, "max_extensions": 0}
    run = (await daemon.create(config(rounds=rounds))).id
    a, clinic = await daemon.clients("a", "clinic")
    first, second = await asyncio.gather(a.task(), clinic.task())
    why = "TRAINING_FAILED: the edge has no sum: its server fails with CERTIFICATE_REVOKED"
    await clinic.withdraw(second.ticket, f"{why}; the log of the edge's agent says why")
    await a.push(first.ticket, filled(1.0))
    said = f"; the ticket of clinic was withdrawn: {why}"
    waits = await daemon.until(run, lambda r: "awaits replacements" in r.reason)
    assert waits.reason.endswith(said)
    (late,) = await daemon.clients("late")
    paused = await daemon.until(run, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    assert paused.reason.startswith("round 1 has 1 of the 2 updates") and paused.reason.endswith(said)
    welcome, idle = await late.register(), (await late.wait()).idle
    assert "is paused" in idle.reason and "still awaited" in welcome.runs[0].reason
    assert "withdrawn" not in idle.reason + welcome.runs[0].reason


async def test_a_deadline_that_passed_while_the_daemon_was_away_counts(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 1, "deadline_s": 1.0}))
    a, b = await daemon.clients("a", "b")
    tasks = await asyncio.gather(a.task(), b.task())
    await a.push(tasks[0].ticket, filled(1.0))
    await daemon.end()
    await asyncio.sleep(1.0)
    daemon = await start()
    done = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    assert done.version == 1


async def test_two_runs_share_their_clients(daemon: Daemon) -> None:
    one = await daemon.create(config(rounds={"count": 2, "clients": 2}), request_id="one")
    two = await daemon.create(config(rounds={"count": 2, "clients": 2}), request_id="two")
    clients = await daemon.clients("a", "b")

    async def work(client) -> list[str]:  # type: ignore[no-untyped-def]
        served = []
        while True:
            answer = await client.wait()
            if not answer.HasField("training"):
                return served
            served.append(answer.training.run)
            await client.push(answer.training.ticket, filled(1.0))

    served = await asyncio.wait_for(asyncio.gather(*(work(c) for c in clients)), 20)
    for runs in served:
        assert sorted(runs) == sorted([one.id, one.id, two.id, two.id])
        assert runs[0] != runs[1], "the run that sampled longest ago comes first"
    for run in (one, two):
        assert (await daemon.run(run.id)).state == run_pb2.RUN_STATE_COMPLETED


async def test_idle_says_what_is_awaited(start: StartDaemon, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.2)
    daemon = await start()
    (a,) = await daemon.clients("a")
    assert (await a.wait()).idle.reason == "there is no unfinished run to work for"
    run = await daemon.create(config(rounds={"count": 1, "clients": 2, "quorum": 2}))
    idle = (await a.wait()).idle
    assert (idle.reason, idle.finished) == (f"round 1 of {run.id} waits for clients: 1 of 2 available", False)
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    assert (await a.wait()).idle.finished


async def test_by_default_the_next_round_opens_without_a_client_that_is_frozen(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "GATHER_S", 0.5)
    run = await daemon.create(config(rounds={"count": 2, "clients": 3, "deadline_s": 1}))
    a, b, frozen = await daemon.clients("a", "b", "frozen")
    tasks = await asyncio.gather(a.task(), b.task(), frozen.task())
    for number in (1, 2):
        for client, task in zip((a, b), tasks, strict=False):
            await client.push(task.ticket, filled(1.0))
        if number == 1:
            tasks = await asyncio.gather(a.task(), b.task())
    done = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    assert done.version == 2
    first, second = await daemon.rounds(run.id)
    assert [t.client for t in first.tickets] == ["a", "b", "frozen"]
    assert [t.client for t in second.tickets] == ["a", "b"], "it closed as soon as both were there"


async def test_who_waits_is_told_that_the_round_may_open_without_others(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.2)
    daemon = await start()
    (a,) = await daemon.clients("a")
    await daemon.create(config(rounds={"count": 1, "clients": 2}))
    reason = (await a.wait()).idle.reason
    assert reason.endswith("1 of 2 available; it opens without the others if they do not come soon")


async def test_a_client_that_is_gone_does_not_hold_up_a_run_with_a_quorum(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 3, "quorum": 2, "min_available": 2}))
    a, b = await daemon.clients("a", "b")
    for client, task in zip((a, b), await asyncio.gather(a.task(), b.task()), strict=True):
        await client.push(task.ticket, filled(1.0))
    done = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    assert done.version == 1
