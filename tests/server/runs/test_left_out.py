"""A client leaves runs out of a call for work: nothing of them is given to it, and it is not sampled for them."""

from __future__ import annotations

import pytest

from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, RawClient, config

ONE = {"count": 2, "clients": 1}


async def look(client: RawClient, *left_out: str) -> fed.AwaitRoundResponse:
    request = fed.AwaitRoundRequest(left_out=left_out)
    return await client.stub.AwaitRound(request, metadata=client.metadata)


async def test_no_offer_no_ticket_and_no_version_of_a_run_that_is_left_out(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = [(await daemon.create(config(rounds=ONE), request_id=str(i))).id for i in range(2)]
    (client,) = await daemon.clients("a")
    assert (await look(client, first)).offer.run.id == second
    for run in (first, second):
        await client.answer(run)
    assert (await look(client, first)).training.run == second
    monkeypatch.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.2)
    assert (await look(client, first, second)).HasField("idle")
    engine = daemon.server.runs.get(first)
    assert engine.open_ticket("a") is None, "it waited, and was not sampled"
    assert (await look(client)).training.run in (first, second)
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    assert (await look(judge, first)).offer.run.id == second
    await judge.answer(second)
    assert (await look(judge, first)).evaluation.run == second


async def test_a_seat_is_not_for_the_runs_that_are_left_out() -> None:
    lobby = Lobby(lambda _: None, TIMING)
    await lobby.wait("a", "", trainer=True, hold_s=0.0, left_out=frozenset({"run-a"}))
    assert lobby.waiting("run-a") == frozenset() and lobby.waiting("run-b") == {"a"}


async def test_a_client_asks_which_runs_are_over(daemon: Daemon) -> None:
    going, over = [(await daemon.create(config(rounds=ONE), request_id=str(i))).id for i in range(2)]
    await daemon.operator.StopRun(op.StopRunRequest(run=over))
    (client,) = await daemon.clients("a")
    request = fed.CheckRunsRequest(runs=[over, "run-none", going])
    answer = await client.stub.CheckRuns(request, metadata=client.metadata)
    assert [(each.run, each.state) for each in answer.runs] == [
        (over, run_pb2.RUN_STATE_STOPPED),
        ("run-none", run_pb2.RUN_STATE_UNSPECIFIED),
        (going, run_pb2.RUN_STATE_RUNNING),
    ]


async def test_a_full_list_of_runs_to_leave_out_is_within_the_bounds_of_the_call(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.05)
    (client,) = await daemon.clients("a")
    request = fed.AwaitRoundRequest(run="", until_finished=True, left_out=[f"run-{i:012}" for i in range(32)])
    assert (await client.stub.AwaitRound(request, metadata=client.metadata)).HasField("idle")
    asked = fed.CheckRunsRequest(runs=[f"run-{i:012}" for i in range(32)])
    assert len((await client.stub.CheckRuns(asked, metadata=client.metadata)).runs) == 32
