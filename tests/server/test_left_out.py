"""A client leaves runs out of a call for work: nothing of them is given to it, and it is not sampled for them."""

from __future__ import annotations

import pytest

from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft_server.rounds.lobby import Lobby

from .conftest import Daemon, RawClient, config

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
    lobby = Lobby(lambda: None)
    await lobby.wait("a", "", trainer=True, hold_s=0.0, left_out=frozenset({"run-a"}))
    assert lobby.waiting("run-a") == frozenset() and lobby.waiting("run-b") == {"a"}
