"""A training is left for what the server says of its ticket, and for nothing else that a question may come to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from fedpeft.errors import FedpeftError, RunFinished, ServerUnreachable, TicketClosed, TicketNotFound, TooManyCalls
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import ticket_watch
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.training_progress import TrainingProgress

ISSUED = pb.GetUploadResponse(state=run_pb2.TICKET_STATE_ISSUED)
LATE = pb.GetUploadResponse(state=run_pb2.TICKET_STATE_LATE)


class Answers:
    """Answers one question after the other, asked at once; then none is left."""

    timing = replace(TIMING, ticket_check_s=0.001)

    def __init__(self, *answers: pb.GetUploadResponse | FedpeftError) -> None:
        self.left = list(answers)
        self.through = asyncio.Event()
        self.said: list[tuple[int, int]] = []

    async def get_upload(self, ticket: str, sha256: bytes, progress: TrainingProgress) -> pb.GetUploadResponse:
        assert (ticket, sha256) == ("t", b"")
        self.said.append((progress.step, progress.steps))
        if not self.left:
            self.through.set()
            return ISSUED
        answer = self.left.pop(0)
        if isinstance(answer, FedpeftError):
            raise answer
        return answer

    async def work(self) -> str:
        await self.through.wait()
        return "trained"


async def test_what_says_nothing_of_the_ticket_is_no_reason_to_leave() -> None:
    answers = Answers(ISSUED, ServerUnreachable("away"), TooManyCalls("32 calls are under way"), LATE)
    assert await ticket_watch.run_while_ticket_open(cast(Channel, answers), "t", answers.work()) == "trained"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (pb.GetUploadResponse(state=run_pb2.TICKET_STATE_LATE, run_finished=True), RunFinished),
        (pb.GetUploadResponse(state=run_pb2.TICKET_STATE_WITHDRAWN), TicketClosed),
        (TicketNotFound("there is no ticket t"), TicketNotFound),
    ],
    ids=["stopped", "withdrawn", "gone"],
)
async def test_what_cannot_count_is_left(answer: pb.GetUploadResponse | FedpeftError, error: type[Exception]) -> None:
    answers, left = Answers(ISSUED, answer), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    with pytest.raises(error):
        await ticket_watch.run_while_ticket_open(cast(Channel, answers), "t", work())
    assert left.is_set()


async def test_what_is_late_is_left_where_nothing_is_made_of_it() -> None:
    answers = Answers(ISSUED, LATE)
    with pytest.raises(TicketClosed, match="TICKET_STATE_LATE"):
        await ticket_watch.run_while_ticket_open(cast(Channel, answers), "t", answers.work(), keeps_late=False)
    assert not answers.through.is_set()


async def test_each_question_says_how_far_the_training_is() -> None:
    answers, steps = Answers(ISSUED, ISSUED), TrainingProgress()

    async def work() -> None:
        steps.take({"step": 0, "steps": 8})
        while (0, 8) not in answers.said:
            await asyncio.sleep(0)
        steps.take({"step": 3, "steps": 8, "loss": 0.1})
        while (3, 8) not in answers.said:
            await asyncio.sleep(0)

    await ticket_watch.run_while_ticket_open(cast(Channel, answers), "t", work(), steps)
    assert set(answers.said) == {(0, 8), (3, 8)}


@pytest.mark.parametrize(
    "odd",
    [{}, {"step": 9, "steps": 8}, {"step": -1, "steps": 8}, {"step": 1.5, "steps": 8}, {"step": 0, "steps": 2**32}],
)
def test_what_another_kind_of_model_says_is_told_only_if_it_makes_sense(odd: dict[str, object]) -> None:
    steps = TrainingProgress()
    steps.take(odd)
    assert (steps.step, steps.steps) == (0, 0)
