"""The updates that a committed round did not fold, beside the limit of its norms."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.rounds.record import parse
from fedpeft.rounds.screening import LARGEST_RMS
from fedpeft_operator.console.feeds.facts import RoundFacts


@dataclass(frozen=True, slots=True)
class Excluded:
    """An update that was received and not folded.

    Attributes:
        client: The client's id.
        norm: Euclidean norm of the update.
        times: `norm` over the limit; None if it was excluded for another reason, or the limit is not known.
        reason: Reason, in a sentence.
    """

    client: str
    norm: float
    times: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Exclusions:
    """The excluded updates of a round.

    Attributes:
        limit: Largest norm that was folded; None if it is not known.
        made_of: Origin of the limit, in words; empty if it is not known.
        updates: The excluded updates, by client.
    """

    limit: float | None
    made_of: str
    updates: tuple[Excluded, ...]


def exclusions(facts: RoundFacts, record: str) -> Exclusions | None:
    """Returns the excluded updates of a round, or None if there are none.

    Args:
        facts: The round.
        record: Its record, canonical JSON; empty if there is none yet or it could not be read.

    Raises:
        BlobCorrupt: If the record is not one.
    """
    tickets = facts.of("excluded")
    if not tickets:
        return None
    bound = parse(record).bound if record else None
    limit = bound.limit if bound else None
    updates = tuple(
        Excluded(
            ticket.client,
            ticket.norm,
            ticket.norm / limit if limit and ticket.norm > limit else None,
            ticket.reason,
        )
        for ticket in tickets
    )
    if bound is None:
        return Exclusions(None, "", updates)
    if bound.reference and bound.limit == bound.factor * bound.reference:
        made_of = f"{bound.factor:g} times {bound.reference:.4g}, the median norm of this round and those before"
    else:
        made_of = f"a change of {LARGEST_RMS:g} in every value" + (
            "" if bound.reference else "; no median is known yet"
        )
    return Exclusions(bound.limit, made_of, updates)
