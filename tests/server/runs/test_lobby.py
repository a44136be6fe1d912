"""A poll of a client that waits, and the matching that follows, cost the same however many others wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Set
from dataclasses import replace
from typing import Any

import pytest

from fedpeft.rpc.timing import HOLD_S, LONGEST_HOLD_S
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.runs import lobby as lobby_module
from fedpeft_server.runs import waiting
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.runs.participation import Participation
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, config
from .test_scale import lines, sit

NUMBERS = (10, 1000)


LINGERING = replace(TIMING, lobby_linger_s=600.0)


async def crowd(number: int, changed: Callable[[str], None] = lambda _: None) -> Lobby:
    """Returns a lobby in which so many clients linger, one of them an evaluator."""
    lobby = Lobby(changed, timing=LINGERING)
    assert lobby.waiting("run-1") == set()
    await sit(lobby, *(f"c{i:05}" for i in range(number)))
    await sit(lobby, "judge", trainer=False)
    return lobby


async def test_a_poll_that_is_repeated_is_no_news_and_costs_the_same() -> None:
    changed: list[str] = []
    counted = []
    for number in NUMBERS:
        lobby = await crowd(number, changed.append)
        assert len(lobby.waiting("run-1")) == number == len(changed)
        changed.clear()
        step = lobby._sit
        waiter = lobby._waiters["c00004"]
        again = lobby_module.Waiter("c00004", "", True, frozenset(), asyncio.get_running_loop().create_future())
        cost, kept = lines(lambda step=step, again=again: step(again))  # type: ignore[misc]
        assert kept is waiter and changed == [] and lobby.waiting("run-1") >= {"c00004"}
        counted.append(cost)
    assert counted[0] == counted[1]


async def test_a_client_that_asks_for_something_else_is_sorted_anew() -> None:
    lobby = await crowd(3)
    await sit(lobby, "c00001", run="run-2")
    assert lobby.waiting("run-1") == {"c00000", "c00002"}
    await sit(lobby, "c00001")
    assert lobby.waiting("run-1") == {"c00000", "c00001", "c00002"}


async def test_evaluators_are_woken_without_a_look_at_the_trainers() -> None:
    counted = []
    for number in NUMBERS:
        lobby = await crowd(number)
        counted.append(lines(lobby.wake_evaluators)[0])
        assert not lobby.is_waiting("judge") and lobby.is_waiting("c00001")
    assert counted[0] == counted[1]


async def test_the_polls_of_all_who_wait_stay_few() -> None:
    few, many = await crowd(100), await crowd(1000)
    assert few.longer_hold_s() == 0, "as ever"
    held = many.longer_hold_s()
    assert HOLD_S < held <= LONGEST_HOLD_S
    assert 1001 / held <= lobby_module.POLLS_PER_S / 0.75


async def test_a_client_that_agreed_is_held_longer(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedpeft_server.rpc.federation.HOLD_S", 0.05)
    run = (await daemon.create()).id
    a, b = await daemon.clients("a", "b")
    for client in (a, b):
        await client.answer(run)
    answers = {}
    for client, hold_s in ((a, 0), (b, 500)):
        request = fed.AwaitRoundRequest(run=run, hold_s=hold_s)
        answers[client.name] = asyncio.ensure_future(_answer(client, request))
    await daemon.operator.PauseRun(op.PauseRunRequest(run=run))
    assert (await answers["a"]).HasField("idle")
    assert not answers["b"].done()
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    assert (await answers["b"]).idle.finished


async def _answer(client: Any, request: fed.AwaitRoundRequest) -> fed.AwaitRoundResponse:
    answer: fed.AwaitRoundResponse = await client.stub.AwaitRound(request, metadata=client.metadata)
    return answer


@pytest.mark.timed(matching_check_s=600.0)
async def test_the_lobby_is_offered_to_runs_that_changed_alone(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    matching = daemon.server.runs.matching
    first, second = [
        (await daemon.create(config(rounds={"count": 1, "clients": 5}), request_id=f"r{i}")).id for i in range(2)
    ]
    offered: list[str] = []

    async def offer(self: RunEngine, _clients: Set[str], _waited_s: float) -> None:
        offered.append(self.run.id)

    monkeypatch.setattr(RunEngine, "offer", offer)
    async with asyncio.timeout(10):
        while matching._changed or not offered:
            matching.wake(first)
            await asyncio.sleep(0.01)
        offered.clear()
        matching.wake(second)
        while not offered:
            await asyncio.sleep(0.01)
    assert offered == [second]


async def test_a_reason_is_made_once_for_all_who_wait(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    run = (await daemon.create(config(rounds={"count": 1, "clients": 5}))).id
    runs = daemon.server.runs
    engine, made = runs.get(run), 0

    def counted(*facts: Any) -> str:
        nonlocal made
        made += 1
        return f"reason {made}"

    monkeypatch.setattr(waiting, "awaited", counted)
    monkeypatch.setattr(daemon.server.store.clock, "time", lambda: 1000.0)
    runs._reasons.forget(run)
    assert {runs.why(engine) for _ in range(1000)} == {"reason 1"}
    runs.participation.mark_offered(run, "a")
    assert runs.why(engine) == "reason 2"
    monkeypatch.setattr(daemon.server.store.clock, "time", lambda: 1001.0)
    assert runs.why(engine) == "reason 3", "it names the seconds to the deadline"


def test_clients_that_were_asked_are_kept_in_order() -> None:
    asked = Participation()
    for client in ("b", "c", "a", "b"):
        asked.mark_offered("run-1", client)
    assert list(asked.awaited("run-1")) == ["a", "b", "c"]
    asked.dismiss("b")
    asked.dismiss("zebra")
    assert list(asked.awaited("run-1")) == ["a", "c"]
    assert not asked.awaited("run-2")
