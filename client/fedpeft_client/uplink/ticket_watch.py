"""Watch of a ticket during training: asks the server if the result can still count, and reports progress."""

from __future__ import annotations

import asyncio
from collections.abc import Container, Coroutine
from typing import Any, NoReturn, TypeVar

from fedpeft.errors import FedpeftError, RunFinished, TicketClosed
from fedpeft.process.race import first_of
from fedpeft.v1 import run_pb2
from fedpeft_client.error_policy import FAULT, NOT_NOW
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.training_progress import TrainingProgress

_CLOSED = (run_pb2.TICKET_STATE_WITHDRAWN, run_pb2.TICKET_STATE_REFUSED)

T = TypeVar("T")


async def run_while_ticket_open(
    channel: Channel,
    ticket: str,
    work: Coroutine[Any, Any, T],
    progress: TrainingProgress | None = None,
    *,
    keeps_late: bool = True,
) -> T:
    """Runs the work of a ticket, and cancels it once its result cannot count any more.

    A round that has closed is no reason to leave: what comes too late goes into the residual, except for a relay. Nor
    is a server that is away: it will want the update when it is back.

    Args:
        channel: The server.
        ticket: Ticket of the work.
        work: The work.
        progress: Progress of the training, reported with each question; None if it is not reported.
        keeps_late: False if what comes too late is of no use.

    Raises:
        RunFinished: If the run was stopped, or is complete.
        TicketNotFound: If the run was deleted, or the server was set up anew.
        TicketClosed: If the ticket was given back or refused, or if it is late and what is late is of no use.
        FedpeftError: Whatever else the server answers, or the work raises.
    """
    closed = _CLOSED if keeps_late else (*_CLOSED, run_pb2.TICKET_STATE_LATE)
    return await first_of(work, _until_ticket_closed(channel, ticket, progress or TrainingProgress(), closed))


async def _until_ticket_closed(
    channel: Channel, ticket: str, progress: TrainingProgress, closed: Container[int]
) -> NoReturn:
    timing = channel.timing
    pause_s = timing.ticket_check_s
    while True:
        await asyncio.sleep(pause_s)
        pause_s = timing.ticket_check_s
        try:
            standing = await channel.get_upload(ticket, b"", progress)
        except FedpeftError as error:
            if isinstance(error, (FAULT, *NOT_NOW)) or error.retry_s is not None:  # no word on the ticket
                pause_s = min(timing.ticket_check_again_s, timing.ticket_check_s)
                continue
            raise
        if standing.run_finished:
            raise RunFinished("the run was stopped, or is complete; its training ends")
        if standing.state in closed:
            raise TicketClosed(f"the ticket is {run_pb2.TicketState.Name(standing.state)}; its training ends")
