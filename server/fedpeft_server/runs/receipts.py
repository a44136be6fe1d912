"""Durable updates that wait to be counted: those that come while a transaction is made share the next one.

A transaction waits for the disk, so updates that arrive together would otherwise wait for it one after the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedpeft.config import RoundsConfig
from fedpeft.errors import FedpeftError, RoundClosed
from fedpeft.rounds import state_machine
from fedpeft.rounds.state_machine import Round, TicketState
from fedpeft_server.runs import audit_trail
from fedpeft_server.store.rows import AuditEvent, UpdateRow
from fedpeft_server.store.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """The receipt of an update that `by` sent: `counted` becomes the row that counts, or what refuses it."""

    update: UpdateRow
    by: str
    counted: asyncio.Future[UpdateRow] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(frozen=True, slots=True)
class Batch:
    """Change of a round by updates that waited together.

    Attributes:
        round: The round after them.
        effects: What follows from it.
        new: Receipts to be given once the round is written.
        repeated: Receipts of tickets that had an update before, or whose round is over.
    """

    round: Round
    effects: tuple[state_machine.Effect, ...]
    new: tuple[Receipt, ...]
    repeated: tuple[Receipt, ...]

    def audit_events(self) -> list[AuditEvent]:
        """Returns what the audit log says of them."""
        return [
            audit_trail.received(self.round, self.round.ticket(each.update.ticket).client, each.update, each.by)
            for each in self.new
        ]

    async def settle(self, store: Store) -> None:
        """Gives the receipts, once the round is written."""
        for receipt in self.new:
            receipt.counted.set_result(receipt.update)
        for receipt in self.repeated:
            ticket = receipt.update.ticket
            counted = await store.transact(store.db.update, ticket)
            if counted is None:
                text = f"the round of ticket {ticket} has closed; keep the update for the next round"
                receipt.counted.set_exception(RoundClosed(text))
            else:
                receipt.counted.set_result(counted)


def batch(current: Round, waiting: Sequence[Receipt], config: RoundsConfig, now: float) -> Batch:
    """Applies updates to a round in the order in which they came; those that it does not take are told so."""
    state, effects = current, list[state_machine.Effect]()
    new, repeated = list[Receipt](), list[Receipt]()
    for receipt in waiting:
        ticket = next((t for t in state.tickets if t.id == receipt.update.ticket), None)
        if ticket is None or ticket.state is TicketState.RECEIVED:
            repeated.append(receipt)
            continue
        try:
            state, follow = state_machine.advance(state, state_machine.Received(ticket.id), config, now)
        except FedpeftError as error:
            receipt.counted.set_exception(error)
            continue
        new.append(receipt)
        effects += follow
    return Batch(state, tuple(effects), tuple(new), tuple(repeated))


def fail(waiting: Sequence[Receipt], error: Exception | None) -> None:
    """Gives those that have no receipt an error; None if the work was cancelled."""
    for receipt in waiting:
        if receipt.counted.done():
            continue
        if error is None:
            receipt.counted.cancel()
        else:
            receipt.counted.set_exception(error)
