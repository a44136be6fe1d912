"""The clients of one run beside each other: their share of the work, and remarks on outliers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fedpeft.formatting import counted
from fedpeft_operator.console.feeds.facts import RoundFacts, TicketFacts
from fedpeft_operator.console.shown.outliers import LEAST, WINDOW, Norm, norms, times

UNEVEN = 10.0
"""Factor from which another number of examples than the median is remarked."""
HIGH_LOSS = 2.0
MOST_ROUNDS_NAMED = 5


@dataclass(frozen=True, slots=True)
class Member:
    """A client of a run, over its last `WINDOW` rounds.

    Attributes:
        client: Its id.
        sampled: Rounds it was sampled in.
        counted: Of them, those with an update of it.
        missed: Tickets late, refused, excluded or withdrawn.
        examples: Its last update's.
        share: `examples` over those of the client that has most, 0 to 1.
        weight: Its share of the mean in its last committed round.
        norm: Its last update's.
        ratio: Median of its norms over what was to be expected.
        loss: Of its last local training.
        remarks: In what the client is an outlier, a sentence each.
    """

    client: str
    sampled: int
    counted: int
    missed: int
    examples: int
    share: float
    weight: float
    norm: float | None
    ratio: float | None
    loss: float | None
    remarks: tuple[str, ...]


def members(rounds: Sequence[RoundFacts]) -> list[Member]:
    """Returns the clients of the last rounds: those with remarks first, then by id."""
    last = rounds[-WINDOW:]
    seen = {facts.number for facts in last}
    by_client: dict[str, list[Norm]] = {}
    for norm in norms(rounds[-2 * WINDOW :]):
        if norm.round in seen:
            by_client.setdefault(norm.client, []).append(norm)
    tickets: dict[str, list[tuple[int, TicketFacts]]] = {}
    for facts in last:
        for ticket in facts.tickets:
            tickets.setdefault(ticket.client, []).append((facts.number, ticket))
    latest = {client: _last_counted(of_one) for client, of_one in tickets.items()}
    received = {client: ticket for client, ticket in latest.items() if ticket is not None}
    usual = _usual(list(received.values()))
    found = [_member(client, tickets[client], by_client.get(client, []), latest[client], usual) for client in tickets]
    return sorted(found, key=lambda member: (not member.remarks, member.client))


def _last_counted(tickets: Iterable[tuple[int, TicketFacts]]) -> TicketFacts | None:
    return next((ticket for _, ticket in reversed(list(tickets)) if ticket.is_counted), None)


@dataclass(frozen=True, slots=True)
class _Usual:
    """Figures that the clients of a run are compared with: medians, None where there are too few, and maxima."""

    examples: float | None
    loss: float | None
    most: int


def _usual(received: Sequence[TicketFacts]) -> _Usual:
    losses = [ticket.loss for ticket in received if ticket.loss is not None]
    return _Usual(
        examples=median([ticket.examples for ticket in received]) if len(received) >= LEAST else None,
        loss=median(losses) if len(losses) >= LEAST else None,
        most=max((ticket.examples for ticket in received), default=0),
    )


def _member(
    client: str,
    tickets: Sequence[tuple[int, TicketFacts]],
    own: Sequence[Norm],
    last: TicketFacts | None,
    usual: _Usual,
) -> Member:
    ratios = [norm.ratio for norm in own if norm.ratio is not None]
    remarks = [*_about_norms(own), *_about_tickets(tickets)]
    if last is not None:
        remarks += _about_data(last, usual)
    return Member(
        client=client,
        sampled=len(tickets),
        counted=sum(ticket.is_counted for _, ticket in tickets),
        missed=sum(ticket.state in ("late", "refused", "excluded", "withdrawn") for _, ticket in tickets),
        examples=last.examples if last else 0,
        share=last.examples / usual.most if last and usual.most else 0.0,
        weight=next((ticket.weight for _, ticket in reversed(tickets) if ticket.weight), 0.0),
        norm=last.norm if last else None,
        ratio=median(ratios) if ratios else None,
        loss=last.loss if last else None,
        remarks=tuple(remarks),
    )


def _about_norms(own: Sequence[Norm]) -> list[str]:
    odd = [norm for norm in own if norm.is_odd]
    if not odd:
        return []
    said = times(median([norm.ratio for norm in odd if norm.ratio is not None]))
    return [f"update norm {said} the median in {_rounds([norm.round for norm in odd])}"]


def _about_tickets(tickets: Sequence[tuple[int, TicketFacts]]) -> list[str]:
    said = []
    for state in ("refused", "excluded", "late"):
        of_state = [(number, ticket) for number, ticket in tickets if ticket.state == state]
        if of_state and (state != "late" or 2 * len(of_state) >= len(tickets)):
            why = of_state[-1][1].reason
            reason = f": {why}" if state != "late" and why else ""
            said.append(f"{state} in {_rounds([number for number, _ in of_state])}{reason}")
    return said


def _about_data(last: TicketFacts, usual: _Usual) -> list[str]:
    said = []
    if last.examples and usual.examples and not 1 / UNEVEN < last.examples / usual.examples < UNEVEN:
        said.append(f"trains on {counted(last.examples, 'example')} (median {usual.examples:,.0f})")
    if last.loss is not None and usual.loss is not None and last.loss > HIGH_LOSS * usual.loss > 0:
        said.append(f"training loss {last.loss:.3f} (median {usual.loss:.3f})")
    return said


def _rounds(numbers: Sequence[int]) -> str:
    """Returns `round 3`, `rounds 3, 4`, `9 rounds, most recently 12`."""
    if len(numbers) > MOST_ROUNDS_NAMED:
        return f"{len(numbers)} rounds, most recently {numbers[-1]}"
    return f"round{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
