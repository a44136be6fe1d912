"""Evaluators get the newest version first, then those that were missed; one that cannot be scored holds up no other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from fedpeft.api import views
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.runs.scoring import _Work
from fedpeft_server.store.database import Database

from ..conftest import Daemon, RawClient, StartDaemon, config, filled, refused
from ..long_history import write_run

ONE = {"count": 4, "clients": 1}


async def rounds(daemon: Daemon, run: str, client: RawClient, number: int) -> None:
    """Holds so many rounds."""
    for _ in range(number):
        task = await client.task(run)
        await client.push(task.ticket, filled(1.0))
        await daemon.until(run, lambda state, version=task.round: state.version >= version)  # type: ignore[misc]


def push(client: RawClient, run: str, version: int, failure: str = "") -> Awaitable[object]:
    metrics = {} if failure else {"accuracy": version / 10}
    request = fed.PushEvaluationRequest(run=run, version=version, metrics=metrics, failure=failure)
    return client.stub.PushEvaluation(request, metadata=client.metadata)


async def evaluator(daemon: Daemon, name: str = "judge") -> RawClient:
    client = daemon.client(name)
    await client.register(fed.CLIENT_ROLE_EVALUATOR)
    return client


async def shown(daemon: Daemon, run: str) -> run_pb2.Scoring:
    (scoring,) = (await daemon.run(run)).evaluators
    return scoring


async def test_the_newest_version_comes_first_and_gaps_are_filled_afterwards(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds=ONE))).id
    (client,) = await daemon.clients("a")
    await rounds(daemon, run, client, 2)
    judge = await evaluator(daemon)
    order = []
    for late in (0, 1, 0, 0):  # a version is committed while the second is scored
        version = (await judge.wait()).evaluation.version
        await rounds(daemon, run, client, late)
        await push(judge, run, version)
        order.append(version)
    assert order == [2, 1, 3, 0]


async def test_a_version_that_cannot_be_scored_is_shown_and_the_others_go_on(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds=ONE))).id
    (client,) = await daemon.clients("a")
    await rounds(daemon, run, client, 2)
    judge = await evaluator(daemon)
    assert (await judge.wait()).evaluation.version == 2
    scoring = await shown(daemon, run)
    assert (scoring.backlog, scoring.scoring_version, scoring.next_version) == (3, 2, 2)
    (listed,) = [c for c in (await daemon.operator.ListClients(op.ListClientsRequest())).clients if c.id == "judge"]
    assert (listed.activity, listed.scoring.run, listed.scoring.version) == ("scoring", run, 2)
    await push(judge, run, 2, "TRAINING_FAILED: the model\x1b[31m does not run")
    assert (await judge.wait()).evaluation.version == 1
    await push(judge, run, 1)
    scoring = await shown(daemon, run)
    assert [(bad.version, bad.reason) for bad in scoring.failed] == [
        (2, "TRAINING_FAILED: the model [31m does not run")
    ]
    assert (scoring.scored, scoring.backlog) == (1, 1)
    (row,) = views.evaluators(await daemon.run(run))
    assert views.evaluator_line(row) == "judge: 1 version to score, the newest is 0, 1 version could not be scored"
    value = daemon.server.metrics.registry.get_sample_value
    assert value("fedpeft_evaluation_backlog", {"run": run}) == 1
    assert value("fedpeft_evaluations_failed_total", {"run": run}) == 1
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    assert (await judge.wait()).evaluation.version == 2, "its site may have changed: it is tried again"
    await push(judge, run, 2)
    assert not (await shown(daemon, run)).failed


async def test_failures_are_kept_over_a_restart_and_checked(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start()
    run = (await daemon.create(config(rounds=ONE))).id
    judge = await evaluator(daemon)
    assert (await judge.wait()).evaluation.version == 0
    await push(judge, run, 0, "no memory")
    both = fed.PushEvaluationRequest(run=run, version=0, metrics={"accuracy": 0.5}, failure="no memory")
    assert await refused(judge.stub.PushEvaluation(both, metadata=judge.metadata)) == "METRICS_INVALID"
    assert await refused(push(judge, run, 3, "no memory")) == "VERSION_NOT_FOUND"
    await daemon.end()
    again = await start()
    scoring = await shown(again, run)
    assert [(bad.version, bad.reason) for bad in scoring.failed] == [(0, "no memory")]
    assert (scoring.scored, scoring.backlog) == (0, 0)


async def test_a_run_that_goes_on_comes_before_what_was_missed_of_a_finished_one(daemon: Daemon) -> None:
    old = (await daemon.create(config(rounds=ONE), request_id="1")).id
    (client,) = await daemon.clients("a")
    await rounds(daemon, old, client, 2)
    await client.answer(old, "enough")
    await daemon.operator.StopRun(op.StopRunRequest(run=old))
    new = (await daemon.create(config(rounds=ONE), request_id="2")).id
    await rounds(daemon, new, client, 1)
    judge = await evaluator(daemon)
    order = []
    for _ in range(5):
        task = (await judge.wait()).evaluation
        await push(judge, task.run, task.version)
        order.append((task.run, task.version))
    assert order == [(new, 1), (old, 2), (new, 0), (old, 1), (old, 0)]


async def test_what_an_evaluator_gets_next_of_very_many_versions_costs_no_query(
    start: StartDaemon, tmp_path: Path
) -> None:
    write_run(tmp_path / "data", "run-long00", 1000, 1)
    daemon = await start()
    judge = await evaluator(daemon)
    first = (await judge.wait()).evaluation
    with counted_queries(daemon) as queries:
        for _ in range(5):
            assert (await judge.wait()).evaluation == first
    assert queries == []


@contextmanager
def counted_queries(daemon: Daemon) -> Iterator[list[str]]:
    """Gives the names of the database's methods that are called meanwhile."""
    store, names = daemon.server.store, list[str]()
    transact, read = store.transact, store.read

    def counted(call: Any) -> Any:
        async def count(method: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(method.__name__)
            return await call(method, *args, **kwargs)

        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "transact", counted(transact))
        patch.setattr(store, "read", counted(read))
        yield names


async def finished(daemon: Daemon, number: int) -> list[str]:
    """Makes so many runs that ended without a round."""
    ids = []
    for each in range(number):
        ids.append((await daemon.create(config(rounds=ONE), request_id=f"finished {each}")).id)
        await daemon.operator.StopRun(op.StopRunRequest(run=ids[-1]))
    return ids


@pytest.mark.parametrize("declines", [False, True], ids=["scored", "declined"])
async def test_a_poll_with_nothing_to_do_looks_at_no_finished_run(daemon: Daemon, declines: bool) -> None:
    ids, judge = await finished(daemon, 5), await evaluator(daemon)
    with counted_queries(daemon) as queries:
        for run in ids:
            assert (await judge.look()).offer.run.id == run
            await judge.answer(run, *(["no data of its classes"] if declines else []))
        for run in () if declines else ids:
            assert (await judge.look()).evaluation.run == run
            await push(judge, run, 0)
        assert queries.count("_books") == 0, "what an evaluator scored is read once, as it registers"
    asked: list[object] = []
    participation = daemon.server.runs.participation
    with pytest.MonkeyPatch.context() as patch, counted_queries(daemon) as queries:
        for name in ("declined", "is_due"):
            real = getattr(participation, name)
            patch.setattr(participation, name, lambda *args, real=real: (asked.append(args), real(*args))[1])
        assert (await judge.look(until_finished=True)).idle.finished
    assert (asked, queries) == ([], [])
    (client,) = await daemon.clients("a")
    new = (await daemon.create(config(rounds=ONE), request_id="new")).id
    await rounds(daemon, new, client, 1)
    assert (await judge.look()).offer.run.id == new
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    first = (await judge.look()).offer.run.id
    assert first == (ids[0] if declines else new), "one that began anew is asked again for what it declined"


async def test_a_version_that_is_scored_while_the_evaluators_work_is_read_is_not_lost(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, reached, go_on = await start(), Event(), Event()
    run = (await daemon.create(config(rounds=ONE))).id
    judge = await evaluator(daemon)
    assert (await judge.wait()).evaluation.version == 0
    await daemon.end()
    daemon, read = await start(), Database.evaluations_by

    def slow(db: Database, name: str) -> object:
        found = read(db, name)
        reached.set()
        go_on.wait()
        return found

    monkeypatch.setattr(Database, "evaluations_by", slow)
    judge = daemon.client("judge")
    polling = asyncio.ensure_future(judge.look())
    try:
        async with asyncio.timeout(10):
            while not reached.is_set():
                await asyncio.sleep(0.01)
        pushing = asyncio.ensure_future(push(judge, run, 0))
        async with asyncio.timeout(10):
            while not await daemon.server.store.transact(daemon.server.store.db.initial_evaluations, [run]):
                await asyncio.sleep(0.01)
    finally:
        go_on.set()
    await pushing
    polling.cancel()
    scoring = await shown(daemon, run)
    assert (scoring.scored, scoring.backlog) == (1, 0)


async def test_runs_are_listed_with_one_query_a_page(daemon: Daemon) -> None:
    ids, judge = await finished(daemon, 4), await evaluator(daemon)
    for run in ids:
        await judge.answer(run)
        await push(judge, run, 0)
    with counted_queries(daemon) as queries:
        listed = (await daemon.operator.ListRuns(op.ListRunsRequest(page_size=3))).runs
    assert [run.initial_metrics["accuracy"] for run in listed] == [0.0] * 3
    assert queries == ["initial_evaluations"]


@pytest.mark.parametrize("declines", [True, False], ids=["declines", "trains"])
async def test_no_figures_are_awaited_of_who_stopped_scoring(daemon: Daemon, declines: bool) -> None:
    run = (await daemon.create(config(rounds=ONE))).id
    judge = await evaluator(daemon)
    await judge.wait()
    daemon.server.runs.show_backlog(daemon.server.runs.get(run))
    backlog = daemon.server.metrics.evaluation_backlog.labels(run)
    assert ((await shown(daemon, run)).evaluator, backlog._value.get()) == ("judge", 1)
    await (judge.answer(run, "no time") if declines else judge.register())
    assert ([*(await daemon.run(run)).evaluators], backlog._value.get()) == ([], 0)


async def test_nothing_is_kept_of_a_deleted_run(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds=ONE))).id
    judge = await evaluator(daemon)
    assert (await judge.wait()).evaluation.version == 0
    await push(judge, run, 0)
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    await daemon.operator.DeleteRun(op.DeleteRunRequest(run=run))
    scoring = daemon.server.runs.scoring
    assert (scoring._evaluators, scoring._versions, scoring._work["judge"]) == ({}, {}, _Work({}))
