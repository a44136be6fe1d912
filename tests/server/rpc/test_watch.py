"""A watch tells what is new, and what that costs does not grow with the rounds that were held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from fedpeft.api.round_parts import folded
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2
from fedpeft_server.rpc import history
from fedpeft_server.store.rows import RunState

from ..conftest import Daemon, StartDaemon, config, filled
from ..connections import on_each_connection
from ..long_history import write_run

RUN = "run-long00"


class Reader:
    """Reads the answers of a watch, each put together from its messages."""

    def __init__(self, daemon: Daemon, run: str, after: int = 0) -> None:
        self._call = daemon.operator.WatchRun(op.WatchRunRequest(run=run, after=after))
        self.largest = 0

    async def answer(self) -> op.WatchRunResponse:
        parts: list[run_pb2.Round] = []
        async with asyncio.timeout(20):
            while True:
                message = await self._call.read()
                assert isinstance(message, op.WatchRunResponse), "the watch has ended"
                self.largest = max(self.largest, message.ByteSize())
                parts += message.rounds
                if not message.more:
                    return op.WatchRunResponse(run=message.run, rounds=parts)

    async def __aiter__(self) -> AsyncIterator[op.WatchRunResponse]:
        while True:
            answer = await self.answer()
            yield answer
            if answer.run.state in (run_pb2.RUN_STATE_COMPLETED, run_pb2.RUN_STATE_STOPPED):
                return


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not reached():
            await asyncio.sleep(0.01)


async def test_a_reader_that_folds_what_it_is_told_knows_what_a_list_says(daemon: Daemon) -> None:
    run = await daemon.create(config(rounds={"count": 3, "clients": 2}))
    known: dict[int, run_pb2.Round] = {}
    told: list[list[run_pb2.Round]] = []

    async def read() -> None:
        nonlocal known
        async for answer in Reader(daemon, run.id):
            told.append(list(answer.rounds))
            known = folded(known, answer.rounds)

    def received() -> set[str]:
        every = [ticket for round_ in known.values() for ticket in round_.tickets]
        return {ticket.id for ticket in every if ticket.state == run_pb2.TICKET_STATE_RECEIVED}

    reading = asyncio.create_task(read())
    a, b = await daemon.clients("a", "b")
    judge = daemon.client("judge")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    for number in (1, 2, 3):
        tasks = await asyncio.gather(a.task(), b.task())
        if number > 1:
            figures = fed.PushEvaluationRequest(run=run.id, version=number - 1, metrics={"accuracy": number / 10})
            await judge.stub.PushEvaluation(figures, metadata=judge.metadata)
        await until(lambda n=number: n in known and len(known[n].tickets) == 2)
        for client, task in zip((a, b), tasks, strict=True):
            await client.push(task.ticket, filled(1.0))
            await until(lambda t=task: t.ticket in received())
    await reading
    listed = await daemon.rounds(run.id)
    for round_ in listed:
        round_.record = ""
        for holder in (round_, *round_.tickets):  # a receipt's own bytes pass after the commit was told
            holder.wire_bytes_down = 0
    for round_ in known.values():
        for holder in (round_, *round_.tickets):
            holder.wire_bytes_down = 0
    assert list(known.values()) == listed
    assert 1 not in {r.number for r in told[-1]}, "round 1 is told no more"
    one_receipt = [r for rounds in told for r in rounds if len(r.tickets) == 1]
    assert one_receipt, "a receipt brings its ticket, not those of the others"


async def test_the_first_answer_begins_where_the_reader_left_off_and_fits_into_messages(
    start: StartDaemon, tmp_path: Path
) -> None:
    write_run(tmp_path / "data", RUN, 1000, 10)
    daemon = await start()
    reader = Reader(daemon, RUN)
    whole = await reader.answer()
    assert list(folded({}, whole.rounds)) == list(range(1, 1001))
    assert whole.ByteSize() > MESSAGE_LIMIT_BYTES > 2 * reader.largest
    assert not any(r.record for r in whole.rounds)
    rest = await Reader(daemon, RUN, after=998).answer()
    assert [r.number for r in rest.rounds] == [999, 1000]
    assert not (await Reader(daemon, RUN, after=5000).answer()).rounds


class Work:
    """Counts what SQLite does, in tens of its machine's instructions."""

    def __init__(self, daemon: Daemon) -> None:
        self.steps = 0
        on_each_connection(daemon, lambda connection: connection.set_progress_handler(self._step, 10))

    def _step(self) -> int:
        self.steps += 1
        return 0


async def test_a_change_costs_the_same_after_a_thousand_rounds(start: StartDaemon, tmp_path: Path) -> None:
    costs: list[tuple[int, int]] = []
    for rounds in (2, 1000):
        folder = tmp_path / str(rounds)
        write_run(folder, RUN, rounds, 1, state=RunState.RUNNING)
        daemon = await start(folder)
        reader = Reader(daemon, RUN, after=rounds)
        await reader.answer()
        judge = daemon.client("judge")
        await judge.register(fed.CLIENT_ROLE_EVALUATOR)
        work = Work(daemon)
        figures = fed.PushEvaluationRequest(run=RUN, version=1, metrics={"accuracy": 0.5})
        await judge.stub.PushEvaluation(figures, metadata=judge.metadata)
        answer = await reader.answer()
        assert {r.number: len(r.tickets) for r in answer.rounds} == {1: 0, rounds + 1: 0}
        assert next(r for r in answer.rounds if r.number == 1).metrics["accuracy"] == 0.5
        costs.append((work.steps, answer.ByteSize()))
        await daemon.end()
    (few_steps, few_bytes), (many_steps, many_bytes) = costs
    assert 0 < many_steps < few_steps + 10
    assert many_bytes < few_bytes + 10


async def test_many_changes_at_once_are_told_with_the_whole_round(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "FEW", 1)
    run = await daemon.create(config(rounds={"count": 1, "clients": 3}))
    reader = Reader(daemon, run.id)
    assert [(r.number, len(r.tickets)) for r in (await reader.answer()).rounds] == [(1, 0)]
    clients = await daemon.clients("a", "b", "c")
    await asyncio.gather(*(client.task() for client in clients))
    while len((answer := await reader.answer()).rounds[0].tickets) != 3:
        assert not answer.rounds[0].tickets
    await daemon.operator.StopRun(op.StopRunRequest(run=run.id))
    last = (await reader.answer()).rounds[-1]
    assert {t.state for t in last.tickets} == {run_pb2.TICKET_STATE_LATE}
