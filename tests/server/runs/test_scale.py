"""Work that is done again and again costs the same however many runs and clients there are."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import TicketNotFound
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.runs.lobby import Lobby
from fedpeft_server.store.rows import AnswerRow
from fedpeft_server.timing import TIMING

from ..conftest import Daemon, RawClient, config, filled

T = TypeVar("T")
ONE = {"count": 1, "clients": 1}
NO_RUN: frozenset[str] = frozenset()


def lines(call: Callable[[], T]) -> tuple[int, T]:
    """Returns how many lines of Python a call executes, and its result."""
    counted = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal counted
        counted += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(before)
    return counted, result


def at_once(step: Coroutine[Any, Any, T]) -> T:
    """Returns the result of a coroutine that waits for nothing."""
    try:
        step.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        step.close()
    raise AssertionError("it waits for something")


async def begin(daemon: Daemon, client: RawClient, number: int) -> list[str]:
    """Creates runs of which each has a ticket for the client; returns the tickets."""
    runs = [(await daemon.create(config(rounds=ONE), request_id=f"r{i}")).id for i in range(number)]
    return [(await client.task(run)).ticket for run in runs]


async def test_a_ticket_is_found_without_a_look_at_the_other_runs(daemon: Daemon) -> None:
    (client,) = await daemon.clients("a")
    tickets = await begin(daemon, client, 6)
    runs = daemon.server.runs
    found = [lines(lambda ticket=ticket: at_once(runs.ticket(ticket))) for ticket in tickets]  # type: ignore[misc]
    assert [ticket.id for _, (_, ticket) in found] == tickets
    assert len({engine.run.id for _, (engine, _) in found}) == 6
    assert len({counted for counted, _ in found}) == 1, "the last run's ticket costs what the first one's does"


async def test_the_index_of_tickets_holds_those_of_rounds_in_progress(daemon: Daemon) -> None:
    (client,) = await daemon.clients("a")
    run = (await daemon.create(config(rounds={"count": 2, "clients": 1}))).id
    runs = daemon.server.runs
    for number in (1, 2):
        ticket = (await client.task(run)).ticket
        assert runs._tickets.run_of(ticket) == run
        await client.push(ticket, filled(1.0))
        await daemon.until(run, lambda state, version=number: state.version == version)  # type: ignore[misc]
        assert runs._tickets.run_of(ticket) is None
        assert (await runs.ticket(ticket))[1].issued_in == number, "it is in the database"
    assert (runs._tickets._runs, runs._tickets._indexed) == ({}, {})
    with pytest.raises(TicketNotFound):
        await runs.ticket("ticket-none")


async def test_clients_are_counted_for_the_active_runs_alone(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, gauge = daemon.server.runs, daemon.server.metrics.clients
    over, going = [(await daemon.create(config(rounds=ONE), request_id=f"r{i}")).id for i in range(2)]

    def shown() -> set[str]:
        return {sample.labels["run"] for family in gauge.collect() for sample in family.samples}

    async with asyncio.timeout(10):
        while shown() != {over, going}:
            await asyncio.sleep(0.01)
    await daemon.operator.StopRun(op.StopRunRequest(run=over))
    assert shown() == {going}, "the series of a run end with it"
    looked: list[str] = []
    labels = gauge.labels

    def spy(run: str, state: str) -> Any:
        looked.append(run)
        return labels(run, state)

    monkeypatch.setattr(gauge, "labels", spy)
    for run in (over, going):
        runs.matching._count_clients(runs.get(run))
    assert set(looked) == {going}
    looked.clear()
    runs.matching._count_clients(runs.get(going))
    assert len(looked) == 3, "a round that is the same has the same tickets"


async def sit(
    lobby: Lobby, *clients: str, run: str = "", trainer: bool = True, left_out: frozenset[str] = NO_RUN
) -> None:
    """Has clients wait for a moment; they linger afterwards."""
    for client in clients:
        await lobby.wait(client, run, trainer=trainer, hold_s=0.0, left_out=left_out)


@pytest.mark.timed(lobby_linger_s=600.0)
async def test_a_look_at_the_lobby_costs_the_same_however_many_wait(daemon: Daemon) -> None:
    """Register, an idle AwaitRound and each look of the daemon's copied all waiting clients, for every run."""
    run = (await daemon.create(config(rounds={"count": 1, "clients": 1000}))).id
    runs = daemon.server.runs
    engine, counted = runs.get(run), []
    for number in (4, 40):
        names = [f"c{i}" for i in range(number)]
        for name in names:
            runs.participation.put(AnswerRow(run, name, True, (), 1, 1.0))
        await sit(runs.lobby, *names)
        assert runs.matching.ready(run) == set(names)
        runs._reasons.forget(run)  # else it might be the daemon that made this one
        counted.append((lines(lambda: runs.matching.ready(run))[0], lines(lambda: runs.why(engine))[0]))
        assert f"{number} of 1000 " in runs.why(engine)
    assert counted[0] == counted[1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sit", "sit", "judge", "choose", "leave out", "call", "answer", "end", "later"]),
            st.sampled_from("abcd"),
            st.sampled_from(["run-1", "run-2"]),
        ),
        max_size=40,
    )
)
def test_who_may_be_sampled_is_what_all_seats_say(steps: list[tuple[str, str, str]]) -> None:
    accepted: set[tuple[str, str]] = set()
    lobby = Lobby(lambda _: None, TIMING, lambda run, client: (run, client) in accepted)

    async def take(step: str, client: str, run: str) -> None:
        match step:
            case "sit":
                await sit(lobby, client)
            case "judge":
                await sit(lobby, client, trainer=False)
            case "choose":
                await sit(lobby, client, run=run)
            case "leave out":
                await sit(lobby, client, left_out=frozenset({run}))
            case "call":
                lobby.wake(client)
            case "answer":
                accepted.symmetric_difference_update({(run, client)})
                lobby.sort(client)
            case "end":
                lobby.forget(run)
            case _:
                for seat in lobby._waiters.values():
                    seat.until = time.monotonic() - 1

    def expected(run: str) -> set[str]:
        there = [s for s in lobby._waiters.values() if s.until >= time.monotonic() and s.trainer and s.run in ("", run)]
        return {s.client for s in there if run not in s.left_out and (run, s.client) in accepted}

    async def play() -> None:
        for step in steps:
            await take(*step)
            for run in ("run-1", "run-2"):
                assert lobby.waiting(run) == expected(run)
            assert set(lobby._lingering) <= set(lobby._waiters)

    asyncio.run(play())


@pytest.mark.timed(lobby_linger_s=600.0)
async def test_a_client_that_registers_again_is_not_ready_until_it_answers(daemon: Daemon) -> None:
    run = (await daemon.create(config(rounds={"count": 1, "clients": 2}))).id
    runs = daemon.server.runs
    a, b = await daemon.clients("a", "b")
    for client in (a, b):
        await client.answer(run)
    await sit(runs.lobby, "a", "other")
    assert runs.matching.ready(run) == {"a"}
    await a.register()
    assert runs.matching.ready(run) == set()
    await a.answer(run)
    assert runs.matching.ready(run) == {"a"}
    await a.answer(run, "no time")
    assert runs.matching.ready(run) == set()
    assert (runs.participation.declined_by(run), len([*runs.participation.declines(run)])) == (1, 1)
    await daemon.operator.StopRun(op.StopRunRequest(run=run))
    assert runs.matching.ready(run) == set()
    assert runs.lobby._waiting == {}
