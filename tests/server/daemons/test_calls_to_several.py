"""A client may call another daemon each time: what one of them learns, all of them know."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from fedpeft.adapters import payload
from fedpeft.identity import audit
from fedpeft.identity.subject import Role, Subject
from fedpeft.rounds.tickets import Ticket
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.runs.runs import Runs
from fedpeft_server.store import database
from fedpeft_server.store.notices.notices import Topic
from fedpeft_server.store.rows import AuditEvent, ClientRow, UpdateRow
from fedpeft_server.store.store import version_prefix
from fedpeft_server.uploads.pipeline import Uploads

from .. import relayed_calls
from ..conftest import SPEC, Daemon, config, filled, header, refused, zeros
from .conftest import Federation, task


async def test_each_call_of_a_round_goes_to_another_daemon(federation: Federation) -> None:
    """Register here, wait there, pull here, push there; each round is folded once, to the bits of one daemon."""
    first, second, third = federation.daemons
    run = await first.create(config(rounds={"count": 3, "clients": 3}))
    clients = await federation.clients("a", "b", "c")
    expected = zeros()
    for number in (1, 2, 3):
        order = [federation.daemons.index(d) for d in np.roll(federation.daemons, number)]
        tasks = await asyncio.gather(*(task(client[at]) for client, at in zip(clients, order, strict=True)))
        assert {(t.round, t.version) for t in tasks} == {(number, number - 1)}
        for client, given, at in zip(clients, tasks, order, strict=True):
            await client[(at + 1) % 3].pull(given.run, given.version)
            await client[(at + 2) % 3].push(given.ticket, filled(float(number)), 10)
        expected = {name: x + np.float32(number) for name, x in expected.items()}
        await third.until(run.id, lambda r, n=number: r.version == n)
    for daemon in federation.daemons:
        ended = await daemon.until(run.id, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
        assert ended.version == 3
    adapter = await second.adapter(run.id, 3)
    assert all(np.array_equal(adapter[name], expected[name]) for name in expected)
    assert not any(place.has_any("updates") for place in first.server.store.places[1:]), "nothing is left behind"
    await federation.until(lambda d: not d.server.store.spool.tickets())


async def test_clients_that_wait_with_several_daemons_are_counted_together(federation: Federation) -> None:
    """A round of three opens though no daemon has more than one of them, and each poll is answered at once."""
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 3}))
    clients = await federation.clients("a", "b", "c")
    early = [asyncio.create_task(task(client[at])) for at, client in enumerate(clients[:2])]
    await federation.until(lambda d: len(d.server.runs.matching.ready(run.id)) == 2)
    for daemon in federation.daemons:
        assert "2 of 3 available" in (await daemon.run(run.id)).reason
        shown = await daemon.operator.ListClients(op.ListClientsRequest())
        assert [c.id for c in shown.clients if c.activity == "waiting"] == ["a", "b"]
    late = asyncio.create_task(task(clients[2][2]))
    tasks = await asyncio.gather(*early, late)
    assert len({t.ticket for t in tasks}) == 3


async def test_who_waited_with_a_daemon_that_is_gone_waits_no_more(federation: Federation) -> None:
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 3}))
    (a,) = await federation.clients("a")
    waiting = asyncio.create_task(a[2].wait(run.id))
    one = federation.daemons[0].server
    await federation.until(lambda d: d.server.runs.matching.ready(run.id) == {"a"})
    await federation.daemons[2].end()
    await asyncio.gather(waiting, return_exceptions=True)
    async with asyncio.timeout(5):
        while one.runs.matching.ready(run.id):
            await asyncio.sleep(0.01)
    assert len(one.presence._heard) == 1


async def test_an_upload_that_another_daemon_has_begun_goes_on_from_nothing(federation: Federation) -> None:
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 1}))
    (a,) = await federation.clients("a")
    given = await task(a[0])
    manifest, data = payload.encode(filled(1.0), SPEC.sent(1), "float32")
    assert await refused(a[0].push_raw(header(given.ticket, manifest), [(0, data[:8])])) == "UPLOAD_INCOMPLETE"
    assert (await a[0].upload(given.ticket, manifest.sha256)).committed_bytes == 8
    assert (await a[1].upload(given.ticket, manifest.sha256)).committed_bytes == 0
    receipt = await a[1].push(given.ticket, filled(1.0))
    assert receipt.sha256 == manifest.sha256
    await federation.daemons[2].until(run.id, lambda r: r.version == 1)
    await federation.until(lambda d: not d.server.store.spool.tickets())


async def test_a_receipt_that_was_lost_is_given_by_another_daemon(federation: Federation) -> None:
    await federation.daemons[0].create(config(rounds={"count": 1, "clients": 2}))
    a, b = await federation.clients("a", "b")
    given, _ = await asyncio.gather(task(a[0]), task(b[1]))
    receipts = await asyncio.gather(*(client.push(given.ticket, filled(1.0)) for client in a))
    assert len({r.SerializeToString() for r in receipts}) == 1
    for client in a:
        assert (await client.upload(given.ticket)).receipt == receipts[0]
    assert await refused(a[2].push(given.ticket, filled(2.0))) == "UPDATE_DIFFERS"


async def test_an_upload_that_another_daemon_counts_meanwhile_has_its_receipt_though_the_round_closed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client whose upload had no answer sends it to another daemon, while the first one comes to count it."""
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 1, "quorum": 1}))
    (a,) = await federation.clients("a")
    given = await task(a[0])
    counted: list[fed.PushUpdateResponse] = []
    repeated = Uploads._repeated

    async def counted_meanwhile(self: Uploads, ticket: Ticket, first: fed.UpdateHeader) -> UpdateRow | None:
        found = await repeated(self, ticket, first)
        if not counted:
            monkeypatch.undo()
            counted.append(await a[1].push(given.ticket, filled(1.0)))
            await federation.until(lambda d: version(d, run.id) == 1)
        return found

    monkeypatch.setattr(Uploads, "_repeated", counted_meanwhile)
    assert [await a[0].push(given.ticket, filled(1.0))] == counted


async def test_a_client_with_a_receipt_is_not_given_its_ticket_again_by_a_daemon_that_has_not_heard_of_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would take the receipt for lost, and send the update again."""
    run = await federation.daemons[0].create(config(rounds={"count": 2, "clients": 2, "quorum": 2}))
    a, b = await federation.clients("a", "b")
    given, other = await asyncio.gather(task(a[0]), task(b[0]))
    await federation.until(lambda d: d.server.runs.is_usable(run.id, "a", given.ticket))

    async def not_yet(keys: Sequence[object]) -> None:
        pass

    for daemon in federation.daemons[1:]:
        monkeypatch.setitem(daemon.server.follower._handlers, Topic.RUN, not_yet)  # type: ignore[arg-type]
    await a[0].push(given.ticket, filled(1.0))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            raise AssertionError(f"it is given work: {await a[1].wait(run.id)}")
    assert not federation.daemons[1].server.runs.is_usable(run.id, "a", given.ticket)
    assert federation.daemons[2].server.runs.is_usable(run.id, "a", given.ticket)
    monkeypatch.undo()
    await b[0].push(other.ticket, filled(1.0))
    assert [t.round for t in await asyncio.gather(task(a[1]), task(b[0]))] == [2, 2]


async def test_a_client_that_began_anew_is_asked_again_by_every_daemon(federation: Federation) -> None:
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 2}))
    (a,) = await federation.clients("a")
    waiting = asyncio.create_task(a[1].wait(run.id))
    await federation.until(lambda d: d.server.runs.participation.accepted(run.id, "a"))
    again = federation.client("a")
    await again[2].register()
    assert (await again[0].look(run.id)).offer.run.id == run.id
    waiting.cancel()
    assert await refused(a[0].look()) == "CLIENT_ID_IN_USE"
    await again[1].answer(run.id, "no data")
    await federation.until(lambda d: d.server.runs.participation.declined(run.id, "a"))


async def test_an_instance_that_lives_with_one_daemon_holds_its_id_with_all(federation: Federation) -> None:
    await federation.daemons[0].create(config(rounds={"count": 1, "clients": 2}))
    (a,) = await federation.clients("a")
    waiting = asyncio.create_task(a[0].wait())
    await federation.until(lambda d: d.server.runs.lobby.is_waiting("a"))
    copy = federation.client("a", instance="ff" * 16)
    for client in copy:
        assert await refused(client.register()) == "CLIENT_ID_IN_USE"
    waiting.cancel()


async def test_a_registration_that_comes_late_takes_nothing_from_the_process_that_registered_meanwhile(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One daemon stands still as it is about to write who registered; that process is dead when it goes on."""
    await federation.daemons[0].create(config(rounds={"count": 1, "clients": 2}))
    dead, alive = federation.client("a"), federation.client("a")
    registrations = federation.daemons[0].server.store.registrations
    write, stands_still, goes_on = registrations._write, threading.Event(), threading.Event()

    def late(rows: Sequence[ClientRow]) -> Sequence[bool]:
        stands_still.set()
        goes_on.wait(10)
        return write(rows)

    monkeypatch.setattr(registrations, "_write", late)
    call = asyncio.create_task(dead[0].register())
    await asyncio.to_thread(stands_still.wait, 10)
    await alive[1].register()
    goes_on.set()
    assert await refused(call) == "DATABASE_LOCKED"
    for client in alive:
        assert (await client.look()).HasField("offer"), "it is served by all"
    monkeypatch.undo()
    again = federation.client("a")
    assert (await again[0].register()).protocol, "the next process is not held up"


async def test_two_daemons_that_first_see_somebody_at_once_let_both_calls_in(federation: Federation) -> None:
    somebody = [Subject(Role.CLIENT, f"new{number}") for number in range(30)]
    stores = [daemon.server.store for daemon in federation.daemons]
    await asyncio.gather(*(s.transact(s.db.identities.seen, each) for each in somebody for s in stores))
    entries = stores[0].db.transactions.entries_after(0, 1000)
    audit.verify(entries)
    assert sorted(e.object for e in entries if e.action == "identity.seen") == sorted(map(str, somebody))


async def test_a_run_that_is_asked_for_with_two_daemons_at_once_is_made_once(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that had no answer asks another one; both have found that there is no run of the request."""
    both, insert = threading.Barrier(2), database.run_queries.insert_run

    def together(*facts: Any) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(5)
            both.abort()
        insert(*facts)

    monkeypatch.setattr(database.run_queries, "insert_run", together)
    made = await asyncio.gather(*(daemon.create(request_id="same") for daemon in federation.daemons[:2]))
    assert len({run.id for run in made}) == 1
    await federation.until(lambda d: [run.run.id for run in d.server.runs.all()] == [made[0].id])


async def test_a_run_is_paused_resumed_and_deleted_with_any_daemon(federation: Federation) -> None:
    one, two, three = (daemon.operator for daemon in federation.daemons)
    run = (await federation.daemons[0].create()).id
    await two.PauseRun(op.PauseRunRequest(run=run, reason="a while"))
    await federation.daemons[2].until(run, lambda r: r.state == run_pb2.RUN_STATE_PAUSED)
    await three.ResumeRun(op.ResumeRunRequest(run=run))
    await federation.daemons[0].until(run, lambda r: r.state == run_pb2.RUN_STATE_RUNNING)
    await one.StopRun(op.StopRunRequest(run=run))
    await two.DeleteRun(op.DeleteRunRequest(run=run))
    await federation.until(lambda d: d.server.runs.find(run) is None)
    assert await refused(three.GetRun(op.GetRunRequest(run=run))) == "RUN_NOT_FOUND"


async def test_a_run_that_is_made_anew_under_its_id_is_taken_up_as_another_one(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part of a parent's run has that one's id again; a daemon stood still while it was deleted and made."""

    async def stands_still(run_id: str) -> None:
        pass

    one, other = federation.daemons[0], federation.daemons[1]
    (a,) = await federation.clients("a")
    made = await relayed_calls.make(one, 0, relayed_calls.ones(), made=relayed_calls.edges(clients=1))
    given = await task(a[1])
    monkeypatch.setattr(other.server.runs, "follow", stands_still)
    await one.operator.StopRun(op.StopRunRequest(run=made.id))
    await one.operator.DeleteRun(op.DeleteRunRequest(run=made.id))
    await relayed_calls.make(one, 0, relayed_calls.ones(), made=relayed_calls.edges(clients=2))
    assert await one.operator.PauseRun(op.PauseRunRequest(run=made.id))
    assert await refused(a[1].push(given.ticket, filled(1.0))) == "RUN_NOT_FOUND"
    monkeypatch.undo()
    await one.operator.ResumeRun(op.ResumeRunRequest(run=made.id))
    await federation.until(lambda d: (e := d.server.runs.find(made.id)) and e.run.config.rounds.clients == 2)
    await federation.until(lambda d: d.server.runs.participation.answer(made.id, "a") is None)
    b = federation.client("b")
    await b[2].register()
    tasks = await asyncio.gather(task(a[1]), task(b[2]))
    assert [each.round for each in tasks] == [1, 1]


async def test_a_run_that_a_daemon_has_not_heard_of_is_not_said_to_be_deleted(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that hears of a deleted run removes what it has of it, and the agent of an edge stops the edge's run."""

    async def hears_nothing(runs: Runs, run_id: str) -> None:
        pass

    (a,) = await federation.clients("a")
    monkeypatch.setattr(Runs, "follow", hears_nothing)
    one, other = federation.daemons[0], federation.daemons[2]
    run = (await one.create(config(rounds={"count": 1, "clients": 2}))).id
    assert other.server.runs.find(run) is None
    asked = fed.CheckRunsRequest(runs=["run-none", run])
    states = [run_pb2.RUN_STATE_UNSPECIFIED, run_pb2.RUN_STATE_RUNNING]
    assert [each.state for each in (await a[2].stub.CheckRuns(asked, metadata=a[2].metadata)).runs] == states
    assert other.server.runs.find(run) is None, "the question alone has nobody take it up"
    assert [each.id for each in (await a[1].register(run=run)).runs] == [run]
    readmitted = op.ReadmitClientRequest(client="a", run=run)
    assert list((await federation.daemons[0].operator.ReadmitClient(readmitted)).runs) == []
    assert list((await other.operator.ReadmitClient(readmitted)).runs) == []


async def test_figures_of_an_evaluator_are_shown_by_every_daemon(federation: Federation) -> None:
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 1}))
    evaluator = federation.client("e")
    await evaluator[0].register(fed.CLIENT_ROLE_EVALUATOR)
    found = await evaluator[1].wait()
    assert (found.evaluation.run, found.evaluation.version) == (run.id, 0)
    request = fed.PushEvaluationRequest(run=run.id, version=0, metrics={"accuracy": 0.5})
    await evaluator[2].stub.PushEvaluation(request, metadata=evaluator[2].metadata)

    labels = {"run": run.id, "split": "test"}
    value = "fedpeft_accuracy"
    await federation.until(lambda d: d.server.metrics.registry.get_sample_value(value, labels) == 0.5)
    await federation.until(lambda d: d.server.runs.scoring.runs_of("e"))
    for daemon in federation.daemons:
        (progress,) = (await daemon.run(run.id)).evaluators
        assert progress.scored == 1


async def test_who_is_revoked_with_one_daemon_is_refused_by_all_with_one_audit_log(
    federation: Federation,
) -> None:
    lost, (one, two, _) = Subject(Role.CLIENT, "lost"), (daemon.server for daemon in federation.daemons)
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 1}))
    (client,) = await federation.clients("lost")
    ticket = await task(client[2])
    db = one.store.db
    await one.store.transact(db.identities.revoke, lost, time.time(), "stolen", "operator", unseen=True)
    await federation.until(lambda d: d is federation.daemons[0] or d.server.admission.is_refused(lost))
    await federation.until(lambda d: d.server.runs.get(run.id).round.ticket(ticket.ticket).state == "withdrawn")
    await two.store.transact(db.identities.restore, lost, time.time(), "operator")
    await federation.until(lambda d: d is federation.daemons[1] or not d.server.admission.is_refused(lost))
    writes = [d.server.store for d in federation.daemons for _ in range(5)]
    await asyncio.gather(*(s.transact(s.db.transactions.write, AuditEvent("server", "tried", "x")) for s in writes))
    entries = db.transactions.entries_after(0, 1000)
    audit.verify(entries)
    assert [e.action for e in entries].count("tried") == 15


@pytest.mark.timed(listen_retry_s=0.05, daemon_gone_s=2.0)
async def test_what_was_told_while_nobody_listened_is_made_up_for(federation: Federation) -> None:
    one = federation.daemons[0].server
    run = await federation.daemons[1].create(config(rounds={"count": 1, "clients": 2}))
    (a,) = await federation.clients("a")
    waiting = asyncio.create_task(a[2].wait())
    await federation.until(lambda d: len(d.server.runs.matching.ready(run.id)) == 1)
    with one.store.db.transactions.engine.begin() as connection:
        of_listeners = "FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()"
        ended = f"SELECT pg_terminate_backend(pid) {of_listeners}"
        assert len(connection.execute(text(ended)).all()) == 3
    other = await federation.daemons[2].create(config(rounds={"count": 1, "clients": 2}), request_id="other")
    (b,) = await federation.clients("b")
    await federation.until(lambda d: d.server.runs.find(other.id) and d.server.runs.matching.ready(run.id) == {"a"})
    tasks = await asyncio.gather(waiting, b[1].wait(run.id))
    assert {t.training.run for t in tasks} == {run.id}


@pytest.mark.timed(daemon_alive_s=0.1, traffic_write_s=0.2, clients_count_s=0.2)
async def test_how_far_clients_are_and_what_they_sent_is_shown_alike_by_every_daemon(federation: Federation) -> None:
    run = await federation.daemons[0].create(config(rounds={"count": 1, "clients": 2}))
    a, b = await federation.clients("a", "b")
    given, other = await asyncio.gather(task(a[0]), task(b[1]))
    request = fed.GetUploadRequest(ticket=given.ticket, step=3, steps=10)
    await a[2].stub.GetUpload(request, metadata=a[2].metadata)
    await b[1].push(other.ticket, filled(1.0))

    def shown(daemon: Daemon) -> bool:
        awaited = daemon.server.runs.progress.awaited(daemon.server.runs.get(run.id), 8)
        return [(client, progress.report.step) for client, progress, _ in awaited] == [("a", 3)]

    await federation.until(shown)
    sums = []
    await asyncio.sleep(0.8)
    for daemon in federation.daemons:
        value = daemon.server.metrics.registry.get_sample_value
        sums.append(tuple(value("fedpeft_round_bytes", {"run": run.id, "direction": way}) for way in ("up", "down")))
        assert value("fedpeft_registered_clients", {"role": "trainer", "state": "present"}) == 2
        assert value("fedpeft_clients", {"run": run.id, "state": "received"}) == 1
    assert len(set(sums)) == 1 and sums[0][0] > 4 * SPEC.parameters


@pytest.mark.settings(keep_versions=2)
@pytest.mark.timed(removal_delay_s=0.02)
async def test_versions_that_one_daemon_removes_are_refused_and_given_to_score_by_none(federation: Federation) -> None:
    one = federation.daemons[0]
    run = (await one.create(config(rounds={"count": 6, "clients": 1}))).id
    (client,), judge = await federation.clients("a"), federation.client("judge")
    await judge[1].register(fed.CLIENT_ROLE_EVALUATOR)
    seen = []
    for number in range(1, 7):
        await client[number % 3].push((await task(client[number % 3])).ticket, filled(0.1))
        await federation.until(lambda daemon, wanted=number: version(daemon, run) == wanted)  # type: ignore[misc]
        if number == 2:
            seen.append((await judge[1].wait()).evaluation.version)
            assert (await judge[1].pull(run, 1))[1], "the second daemon has it at hand"
    store = one.server.store
    async with asyncio.timeout(10):
        while len(await asyncio.to_thread(list, store.blobs.keys(f"runs/{run}/versions"))) > 3:
            await asyncio.sleep(0.02)
    for calls in judge:
        assert await refused(calls.pull(run, 1)) == "VERSION_REMOVED"
    await federation.until(lambda daemon: daemon.server.runs.scoring._removed[run] == 0b11110)
    for _ in range(3):
        seen.append((await judge[1].wait()).evaluation.version)
        request = fed.PushEvaluationRequest(run=run, version=seen[-1], metrics={"accuracy": 0.5})
        await judge[2].stub.PushEvaluation(request, metadata=judge[2].metadata)
        await federation.until(lambda daemon, of=seen[-1]: not is_missing(daemon, run, of))  # type: ignore[misc]
    assert seen == [2, 6, 5, 0]
    left = await asyncio.to_thread(lambda: sorted(store.blobs.keys(f"runs/{run}/versions")))
    assert [key[: len(version_prefix(run, 0))] for key in left] == [version_prefix(run, n) for n in (0, 5, 6)]


def version(daemon: Daemon, run: str) -> int:
    engine = daemon.server.runs.find(run)
    return engine.run.version if engine else -1


def is_missing(daemon: Daemon, run: str, of: int) -> bool:
    """Returns True if a daemon that knows what the evaluator scored would give it a version."""
    work = daemon.server.runs.scoring._work.get("judge")
    return work is not None and work.missing.get(run) == of
