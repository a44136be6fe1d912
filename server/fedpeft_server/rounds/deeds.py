"""What the audit log says of the tickets of a round."""

from __future__ import annotations

from fedpeft.audit import Detail
from fedpeft.rounds import Round, Ticket
from fedpeft_server.store.rows import Deed, UpdateRow


def received(current: Round, client: str, update: UpdateRow, by: str) -> Deed:
    """Says that the update of a client was received."""
    return Deed(
        by,
        "update.received",
        current.run,
        {
            "client": client,
            "round": current.number,
            "ticket": update.ticket,
            "examples": update.examples,
            "payload_bytes": update.manifest.payload_bytes,
            "payload_sha256": update.manifest.sha256.hex(),
        },
    )


def of_ticket(current: Round, ticket: Ticket, action: str, reason: str, by: str) -> Deed:
    """Says that something was done with a ticket, and why."""
    details: dict[str, Detail] = {
        "client": ticket.client,
        "round": current.number,
        "ticket": ticket.id,
        "reason": reason,
    }
    return Deed(by, action, current.run, {**details, "reason": reason})
