"""A run is offered, accepted or declined: who is sampled, what stands over restarts, and who is told why."""

from __future__ import annotations

import asyncio

import pytest

from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2

from ..conftest import Daemon, RawClient, StartDaemon, config, filled, refused

WHY = "has no label 'flags'"
ONE = config(rounds={"count": 1, "clients": 1})


async def offered(client: RawClient, run: str = "") -> str:
    answer = await client.look(run)
    assert answer.HasField("offer"), answer
    return answer.offer.run.id


async def client_shown(daemon: Daemon, name: str) -> op.Client:
    found = await daemon.operator.ListClients(op.ListClientsRequest())
    return next(c for c in found.clients if c.id == name)


async def test_a_run_is_offered_whole_before_any_ticket(daemon: Daemon) -> None:
    run = await daemon.create(ONE)
    (a,) = await daemon.clients("a")
    offer = (await a.look()).offer.run
    assert (offer.id, offer.backbone_fingerprint, offer.spec) == (run.id, run.backbone_fingerprint, run.spec)
    assert wire.config_from_proto(offer.config) == ONE
    assert await offered(a) == run.id, "an offer that was not answered is made again"
    current = (await daemon.operator.GetRun(op.GetRunRequest(run=run.id))).round
    assert current.phase == run_pb2.ROUND_PHASE_WAITING and not current.tickets
    assert "0 of 1 available, the answer of a is awaited" in (await daemon.run(run.id)).reason
    await a.answer(run.id, examples=12)
    assert (await a.look()).training.run == run.id
    (answer,) = (await client_shown(daemon, "a")).answers
    assert (answer.run, answer.answer, answer.examples) == (run.id, fed.ANSWER_ACCEPTED, 12)


async def test_a_client_that_waits_is_offered_a_new_run_at_once(daemon: Daemon) -> None:
    (a,) = await daemon.clients("a")
    waiting = asyncio.create_task(a.look())
    while not daemon.server.runs.lobby.is_waiting("a"):
        await asyncio.sleep(0.01)
    run = await daemon.create(ONE)
    assert (await waiting).offer.run.id == run.id


async def test_who_declined_is_not_sampled_and_the_operator_sees_why(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "deadline_s": 60}))
    a, b = await daemon.clients("a", "b")
    assert await offered(b) == run.id
    await b.answer(run.id, WHY)
    waiting = asyncio.create_task(b.look())
    task = await a.task()
    await a.push(task.ticket, filled(1.0))
    assert (await waiting).idle.finished
    (done,) = await daemon.rounds(run.id)
    assert [t.client for t in done.tickets] == ["a"]
    shown = await daemon.run(run.id)
    assert [(d.client, list(d.reasons)) for d in shown.declines] == [("b", [WHY])]


async def test_who_would_train_by_another_algorithm_counts_as_one_that_declined(daemon: Daemon) -> None:
    proximal = {"algorithm": {"name": "fedprox", "mu": 0.1}}
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "deadline_s": 60}, training=proximal))
    new, old = await daemon.clients("new", "old")
    await offered(old)
    await old.answer(run.id, examples=5)
    shown = await daemon.run(run.id)
    why = "it would train by the algorithm 'plain', and the run's is 'fedprox'; update its software"
    assert [(d.client, list(d.reasons)) for d in shown.declines] == [("old", [why])]
    await offered(new)
    await new.answer(run.id, algorithm="fedprox")
    assert (await new.look()).training.run == run.id


@pytest.mark.parametrize("mechanism", ["local", "example"])
async def test_who_would_add_no_noise_counts_as_one_that_declined(daemon: Daemon, mechanism: str) -> None:
    noise = {"mechanism": mechanism, "clip_norm": 1.0, "noise_multiplier": 60.0, "delta": 1e-5}
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "deadline_s": 60}, privacy=noise))
    new, old, other = await daemon.clients("new", "old", "other")
    for client, said in ((old, ""), (other, "laplace")):
        await offered(client)
        await client.answer(run.id, examples=5, mechanism=said)
    shown = await daemon.run(run.id)
    assert {d.client: list(d.reasons) for d in shown.declines} == {
        "old": [f"it would add no noise to what it sends, and the run's is {mechanism!r}; update its software"],
        "other": [
            f"it would add noise by the mechanism 'laplace', and the run's is {mechanism!r}; update its software"
        ],
    }
    await offered(new)
    await new.answer(run.id, mechanism=mechanism)
    assert (await new.look()).training.run == run.id


async def test_noise_of_the_server_needs_nothing_of_a_client(daemon: Daemon) -> None:
    noise = {"mechanism": "central", "clip_norm": 1.0, "noise_multiplier": 20.0, "delta": 1e-5}
    run = await daemon.create(config(rounds={"count": 1, "clients": 1}, privacy=noise))
    (a,) = await daemon.clients("a")
    await offered(a)
    await a.answer(run.id)
    assert (await a.look()).training.run == run.id


async def test_the_wait_names_how_many_declined_but_tells_no_client_why(daemon: Daemon) -> None:
    run = await daemon.create()
    a, b = await daemon.clients("a", "b")
    await offered(b)
    await b.answer(run.id, WHY)
    shown = await daemon.run(run.id)
    assert shown.reason.endswith("waits for clients: 0 of 2 available, 1 declined")
    assert [d.client for d in shown.declines] == ["b"] and shown.declines[0].at.seconds
    (answer,) = (await client_shown(daemon, "b")).answers
    assert (answer.answer, list(answer.reasons)) == (fed.ANSWER_DECLINED, [WHY])
    offer = (await a.look()).offer.run
    assert not offer.declines and WHY not in offer.reason


async def test_a_watch_tells_a_decline_when_it_comes(daemon: Daemon) -> None:
    run = await daemon.create()
    (b,) = await daemon.clients("b")
    watching = asyncio.create_task(daemon.until(run.id, lambda r: bool(r.declines)))
    await asyncio.sleep(0)
    await b.answer(run.id, WHY)
    assert list((await watching).declines[0].reasons) == [WHY]


async def test_a_decline_stands_over_a_restart_of_the_server_and_nobody_is_asked_again(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create()
    a, b = await daemon.clients("a", "b")
    await a.answer(run.id)
    await b.answer(run.id, WHY)
    await daemon.end()
    daemon = await start()
    shown = await daemon.run(run.id)
    assert [(d.client, list(d.reasons)) for d in shown.declines] == [("b", [WHY])]
    idle = (await daemon.client("b").look(until_finished=True)).idle
    assert idle.finished, "b takes part in no unfinished run"
    waiting = asyncio.create_task(daemon.client("a").look())
    while not (ready := daemon.server.runs.matching.ready(run.id)):
        assert not waiting.done(), "it was asked again"
        await asyncio.sleep(0.01)
    assert ready == {"a"}
    waiting.cancel()


async def test_a_client_that_registers_again_is_asked_again_and_may_have_been_mended(daemon: Daemon) -> None:
    run = await daemon.create(ONE)
    (b,) = await daemon.clients("b")
    await b.answer(run.id, WHY)
    assert (await b.look(until_finished=True)).idle.finished
    await b.register()
    assert [d.client for d in (await daemon.run(run.id)).declines] == ["b"], "shown until it is answered anew"
    assert await offered(b) == run.id
    await b.answer(run.id)
    assert not (await daemon.run(run.id)).declines
    assert (await b.look()).training.run == run.id


async def test_declining_gives_the_ticket_back_and_another_is_sampled(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 1, "clients": 1, "min_available": 1}))
    (a,) = await daemon.clients("a")
    task = await a.task()
    for _ in range(2):
        await a.answer(run.id, "3 images cannot be read", "the disk is failing")
    (current,) = await daemon.rounds(run.id)
    assert [(t.state, t.reason) for t in current.tickets] == [
        (run_pb2.TICKET_STATE_WITHDRAWN, "3 images cannot be read; the disk is failing")
    ]
    assert await refused(a.push(task.ticket, filled(1.0))) == "TICKET_CLOSED"
    (b,) = await daemon.clients("b")
    await b.push((await b.task()).ticket, filled(1.0))
    await daemon.until(run.id, lambda r: r.version == 1)


async def test_a_restarted_client_is_asked_first_about_the_run_whose_ticket_it_holds(daemon: Daemon) -> None:
    older = await daemon.create(request_id="older")
    newer = await daemon.create(ONE, request_id="newer")
    (a,) = await daemon.clients("a")
    await a.answer(older.id)
    await a.answer(newer.id)
    assert (await a.look()).training.run == newer.id
    await a.register()
    assert await offered(a) == newer.id
    await a.answer(newer.id)
    assert (await a.look()).training.run == newer.id
    assert (await a.look(older.id)).offer.run.id == older.id


async def test_an_evaluator_declines_a_run_that_is_over_and_goes_on_to_the_next(daemon: Daemon) -> None:
    old = await daemon.create(request_id="old")
    await daemon.operator.StopRun(op.StopRunRequest(run=old.id))
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    assert await offered(judge) == old.id
    await judge.answer(old.id, WHY)
    assert (await judge.look(until_finished=True)).idle.finished
    new = await daemon.create(request_id="new")
    assert await offered(judge) == new.id
    await judge.answer(new.id)
    assert (await judge.look()).evaluation.run == new.id


async def test_until_finished_is_answered_at_once_only_when_nothing_is_left(daemon: Daemon) -> None:
    run = await daemon.create()
    (a,) = await daemon.clients("a")
    await a.answer(run.id, WHY)
    async with asyncio.timeout(5):
        idle = (await a.look(until_finished=True)).idle
    assert idle.finished and idle.reason == "this client declined every unfinished run"
    await a.answer(run.id)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await a.look(until_finished=True)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (fed.AnswerOfferRequest(answer=fed.ANSWER_DECLINED, reasons=["x"]), "RUN_NOT_FOUND"),
        (fed.AnswerOfferRequest(run="RUN"), "ANSWER_INVALID"),
        (fed.AnswerOfferRequest(run="RUN", answer=fed.ANSWER_DECLINED, reasons=["", " "]), "ANSWER_INVALID"),
        (fed.AnswerOfferRequest(run="RUN", answer=9), "ANSWER_INVALID"),
    ],
)
async def test_a_wrong_answer_is_refused(daemon: Daemon, request_: fed.AnswerOfferRequest, reason: str) -> None:
    run = await daemon.create()
    (a,) = await daemon.clients("a")
    request_.run = request_.run.replace("RUN", run.id)
    assert await refused(a.stub.AnswerOffer(request_, metadata=a.metadata)) == reason
    stranger = daemon.client("stranger")
    assert await refused(stranger.answer(run.id)) == "NOT_REGISTERED"


async def test_a_deleted_run_takes_its_answers_with_it(daemon: Daemon) -> None:
    run = await daemon.create()
    a, b = await daemon.clients("a", "b")
    await a.answer(run.id)
    await b.answer(run.id, WHY)
    assert {(r.client, r.accepted) for r in daemon.server.store.db.answers()} == {("a", True), ("b", False)}
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run.id))
    assert daemon.server.store.db.answers() == []
    assert await refused(b.answer(run.id, WHY)) == "RUN_NOT_FOUND"
    assert not (await client_shown(daemon, "b")).answers


async def test_long_and_many_reasons_are_cut(daemon: Daemon) -> None:
    run = await daemon.create()
    (a,) = await daemon.clients("a")
    await a.answer(run.id, *(["x" * 5000] * 12))
    (decline,) = (await daemon.run(run.id)).declines
    assert [len(r) for r in decline.reasons] == [512] * 8


async def test_a_reason_does_not_steer_the_operators_terminal(daemon: Daemon) -> None:
    run = await daemon.create()
    (a,) = await daemon.clients("a")
    await a.answer(run.id, "no\x1b[2J\nthe run is completed")
    (decline,) = (await daemon.run(run.id)).declines
    assert list(decline.reasons) == ["no [2J the run is completed"]


async def test_a_dry_run_hears_what_register_says_and_leaves_no_trace(start: StartDaemon) -> None:
    daemon = await start(max_clients=1)
    run = await daemon.create()
    rehearsal = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, dry_run=True)
    a, b = daemon.client("a"), daemon.client("b")
    heard = await a.stub.Register(rehearsal, metadata=a.metadata)
    assert [r.id for r in heard.runs] == [run.id]
    assert not (await daemon.operator.ListClients(op.ListClientsRequest())).clients
    assert await refused(a.look()) == "NOT_REGISTERED"
    other = daemon.client("a", instance="f" * 32)
    await other.register()
    seen = (await client_shown(daemon, "a")).last_seen
    assert await refused(a.stub.Register(rehearsal, metadata=a.metadata)) == "CLIENT_ID_IN_USE"
    assert await refused(b.stub.Register(rehearsal, metadata=b.metadata)) == "TOO_MANY_CLIENTS"
    assert (await client_shown(daemon, "a")).last_seen == seen
    await other.register()


async def test_two_processes_on_copies_of_one_state_do_not_chase_each_other(daemon: Daemon) -> None:
    await daemon.create()
    first, second = daemon.client("a"), daemon.client("a")
    first.metadata = (*first.metadata, (wire.PROCESS_KEY, "1" * 32))
    second.metadata = (*second.metadata, (wire.PROCESS_KEY, "2" * 32))
    await first.register()
    assert await offered(first)
    await second.register()
    assert await refused(first.look()) == "CLIENT_ID_IN_USE"
    assert await offered(second)


async def test_a_restarted_process_takes_its_id_over_at_once_and_after_a_restart_of_the_server(
    start: StartDaemon,
) -> None:
    daemon = await start()
    run = await daemon.create()
    (a,) = await daemon.clients("a")
    await a.answer(run.id, WHY)
    await daemon.end()
    daemon = await start()
    a = daemon.client("a")
    a.metadata = (*a.metadata, (wire.PROCESS_KEY, "1" * 32))
    assert (await a.look(until_finished=True)).idle.finished
    again = daemon.client("a")
    again.metadata = (*again.metadata, (wire.PROCESS_KEY, "2" * 32))
    await again.register()
    assert await offered(again) == run.id


@pytest.mark.parametrize("examples", [10**9 + 1, 2**63, 2**64 - 1])
async def test_more_examples_than_an_update_may_claim_are_refused_with_the_answer(
    daemon: Daemon, examples: int
) -> None:
    run = await daemon.create()
    (a,) = await daemon.clients("a")
    assert await refused(a.answer(run.id, examples=examples)) == "ANSWER_INVALID"
    await a.answer(run.id, examples=10**9)
    (answer,) = (await client_shown(daemon, "a")).answers
    assert answer.examples == 10**9
