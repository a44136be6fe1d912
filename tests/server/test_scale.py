"""Work that is done again and again costs the same however many runs and clients there are."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

import pytest

from fedpeft.errors import TicketNotFound
from fedpeft.v1 import operator_service_pb2 as op

from .conftest import Daemon, RawClient, config, filled

T = TypeVar("T")
ONE = {"count": 1, "clients": 1}


def lines(step: Coroutine[Any, Any, T]) -> tuple[int, T]:
    """Returns how many lines of Python a coroutine executes that waits for nothing, and its result."""
    counted = 0

    def trace(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal counted
        counted += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step.send(None)
    except StopIteration as end:
        return counted, end.value
    finally:
        sys.settrace(before)
        step.close()
    raise AssertionError("it waits for something")


async def begin(daemon: Daemon, client: RawClient, number: int) -> list[str]:
    """Creates runs of which each has a ticket for the client; returns the tickets."""
    runs = [(await daemon.create(config(rounds=ONE), request_id=f"r{i}")).id for i in range(number)]
    return [(await client.task(run)).ticket for run in runs]


async def test_a_ticket_is_found_without_a_look_at_the_other_runs(daemon: Daemon) -> None:
    (client,) = await daemon.clients("a")
    tickets = await begin(daemon, client, 6)
    found = [lines(daemon.server.runs.ticket(ticket)) for ticket in tickets]
    assert [ticket.id for _, (_, ticket, _) in found] == tickets
    assert len({engine.run.id for _, (engine, _, _) in found}) == 6
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
        assert (await runs.ticket(ticket))[2] == number, "it is in the database"
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
    runs._count_clients()
    assert set(looked) == {going}
    looked.clear()
    runs._count_clients()
    assert len(looked) == 3, "a round that is the same has the same tickets"
