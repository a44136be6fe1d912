"""Entries of the audit log about the tickets of a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedpeft.identity.audit import Detail
from fedpeft.rounds.commit import Outcome
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket
from fedpeft_server.store.rows import AuditEvent, UpdateRow

SET_ASIDE = "client.set_aside"
"""The action of an entry about a client that is sampled last from now on."""


def received(current: Round, client: str, update: UpdateRow, by: str) -> AuditEvent:
    """Returns the audit event of a received update."""
    return AuditEvent(
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


def excluded(current: Round, why: Mapping[str, str], by: str) -> list[AuditEvent]:
    """Returns the audit events of updates that are not folded; `why` is by ticket."""
    return [of_ticket(current, t, "update.excluded", why[t.id], by) for t in current.tickets if t.id in why]


def lost(current: Round, why: Mapping[str, str], by: str) -> list[AuditEvent]:
    """Returns the audit events of updates whose bytes are not there any more; `why` is by ticket."""
    return [of_ticket(current, t, "update.lost", why[t.id], by) for t in current.tickets if t.id in why]


def committed(folded: Round, done: Round, outcome: Outcome, aside: Sequence[str], by: str) -> list[AuditEvent]:
    """Returns the audit events of a committed round, those of updates left out excepted; `aside` are set aside."""
    details: dict[str, Detail] = {
        "round": done.number,
        "updates": len(outcome.weights),
        "record_sha256": outcome.record_sha256,
    }
    return [
        *excluded(folded, outcome.excluded, by),
        AuditEvent(by, "round.committed", done.run, details),
        *(AuditEvent(by, SET_ASIDE, done.run, {"client": client}) for client in aside),
    ]


def of_ticket(current: Round, ticket: Ticket, action: str, reason: str, by: str) -> AuditEvent:
    """Returns the audit event of an action on a ticket, with its reason."""
    details: dict[str, Detail] = {
        "client": ticket.client,
        "round": current.number,
        "ticket": ticket.id,
        "reason": reason,
    }
    return AuditEvent(by, action, current.run, details)
