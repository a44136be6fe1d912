"""Durable updates that wait to be counted: those that come while a transaction is made share the next one.

A transaction waits for the disk, so updates that arrive together would otherwise wait for it one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpeft.config import RoundsConfig
from fedpeft.errors import FedpeftError, RoundClosed, UpdateDiffers
from fedpeft.rounds.events import Received
from fedpeft.rounds.tickets import TicketState
from fedpeft.rounds.transitions import Changes, RunStatus, changes, transition
from fedpeft_server.runs import audit_trail
from fedpeft_server.store.rows import Transition, UpdateRow
from fedpeft_server.store.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """The receipt of an update that `by` sent: `counted` becomes the row that counts, or what refuses it."""

    update: UpdateRow
    by: str
    counted: asyncio.Future[UpdateRow] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, slots=True)
class Batch:
    """Updates that waited together, applied to a run.

    Attributes:
        changes: Changes that they make; None if none.
        new: Receipts to be given once that is written.
        repeated: Receipts of tickets that had an update before, or whose round is over.
        refused: The others, each with its error.
    """

    changes: Changes | None
    new: tuple[Receipt, ...]
    repeated: tuple[Receipt, ...]
    refused: tuple[tuple[Receipt, FedpeftError], ...]

    def transition(self) -> Transition | None:
        """Returns what is to be written; None if nothing is."""
        if self.changes is None:
            return None
        done = self.changes.round
        said = [audit_trail.received(done, done.ticket(e.update.ticket).client, e.update, e.by) for e in self.new]
        return Transition(self.changes, [each.update for each in self.new], audit_events=said)

    async def settle(self, store: Store) -> None:
        """Gives the receipts, once the transition is written."""
        for receipt in self.new:
            receipt.counted.set_result(receipt.update)
        for receipt, error in self.refused:
            receipt.counted.set_exception(error)
        for receipt in self.repeated:
            ticket = receipt.update.ticket
            counted = await store.transact(store.db.update, ticket)
            if counted is None:
                text = f"the round of ticket {ticket} has closed; keep the update for the next round"
                receipt.counted.set_exception(RoundClosed(text))
            elif counted.manifest.sha256 != receipt.update.manifest.sha256:
                text = f"another update was already received for {ticket}; that one counts"
                receipt.counted.set_exception(UpdateDiffers(text))
            else:
                receipt.counted.set_result(counted)


def batch(status: RunStatus, waiting: Sequence[Receipt], config: RoundsConfig, now: float) -> Batch:
    """Applies updates to a run in the order in which they came."""
    after, new, repeated = status, list[Receipt](), list[Receipt]()
    refused = list[tuple[Receipt, FedpeftError]]()
    for receipt in waiting:
        ticket = after.round.tickets.find(receipt.update.ticket)
        if ticket is None or ticket.state is TicketState.RECEIVED:
            repeated.append(receipt)
            continue
        try:
            made = transition(after, [Received(ticket.id)], config, now)
        except FedpeftError as error:
            refused.append((receipt, error))
            continue
        if made is not None:
            after = made.after
            new.append(receipt)
    found = changes(status, after, config, now) if new else None
    return Batch(found, tuple(new), tuple(repeated), tuple(refused))


def fail(waiting: Sequence[Receipt], error: Exception | None) -> None:
    """Gives those that have no receipt an error; None if the work was cancelled."""
    for receipt in waiting:
        if receipt.counted.done():
            continue
        if error is None:
            receipt.counted.cancel()
        else:
            receipt.counted.set_exception(error)
