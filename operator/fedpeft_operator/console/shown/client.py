"""Contents of a client's page: its description of itself, and its part in the runs that are followed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fedpeft import formatting
from fedpeft_operator.console.feeds.facts import RoundFacts, TicketFacts
from fedpeft_operator.console.shown.members import members
from fedpeft_operator.console.shown.outliers import Norm, norms
from fedpeft_operator.console.shown.run import Tile
from fedpeft_operator.console.shown.series import Json, scatter


@dataclass(frozen=True)
class Followed:
    """A run and its rounds."""

    run: str
    name: str
    rounds: Sequence[RoundFacts]

    @cached_property
    def norms(self) -> list[Norm]:
        """Every update's norm."""
        return list(norms(self.rounds))

    @cached_property
    def norms_of(self) -> dict[str, dict[int, Norm]]:
        """The norms by client and round."""
        found: dict[str, dict[int, Norm]] = {}
        for norm in self.norms:
            found.setdefault(norm.client, {})[norm.round] = norm
        return found

    @cached_property
    def tickets_of(self) -> dict[str, list[tuple[RoundFacts, TicketFacts]]]:
        """The tickets by client, newest round first."""
        found: dict[str, list[tuple[RoundFacts, TicketFacts]]] = {}
        for facts in reversed(self.rounds):
            for ticket in facts.tickets:
                found.setdefault(ticket.client, []).append((facts, ticket))
        return found

    @cached_property
    def remarks(self) -> dict[str, tuple[str, ...]]:
        """Differences from the others, by client."""
        return {member.client: member.remarks for member in members(self.rounds)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One ticket of the client.

    Attributes:
        run: Id of the run.
        name: Of the run.
        round: Number.
        ticket: Outcome of its ticket.
        ratio: Norm over what was to be expected.
        is_odd: True if that stands out.
    """

    run: str
    name: str
    round: int
    ticket: TicketFacts
    ratio: float | None
    is_odd: bool


def history(client: str, runs: Iterable[Followed]) -> list[Entry]:
    """Returns every ticket of a client, newest run and round first."""
    return [
        _entry(followed, facts, ticket, followed.norms_of.get(client, {}).get(facts.number))
        for followed in runs
        for facts, ticket in followed.tickets_of.get(client, ())
    ]


def tiles(entries: Sequence[Entry]) -> list[Tile]:
    """Returns a client's history in four figures."""
    states = [entry.ticket.state for entry in entries]
    up, down = sum(entry.ticket.up for entry in entries), sum(entry.ticket.down for entry in entries)
    refused = states.count("refused") + states.count("excluded")
    late, withdrawn = states.count("late"), states.count("withdrawn")
    odd = sum(entry.is_odd for entry in entries)
    return [
        Tile("Sampled", f"{len(entries)}", f"{states.count('issued')} awaited now"),
        Tile(
            "Counted",
            f"{states.count('received')}",
            f"{late} late, {refused} refused or excluded, {withdrawn} withdrawn",
        ),
        Tile("Sent up", formatting.size(up), f"down {formatting.size(down)}"),
        Tile("Outlier norms", f"{odd}", "compared with the median of the round"),
    ]


def remarks(client: str, runs: Iterable[Followed]) -> list[tuple[Followed, str]]:
    """Returns the remarks on a client, by run."""
    return [(followed, remark) for followed in runs for remark in followed.remarks.get(client, ())]


def chart(client: str, runs: Iterable[Followed]) -> tuple[Followed, Json] | None:
    """Returns the norms of the newest run that has updates of the client, its own apart from the others'."""
    for followed in runs:
        if client in followed.norms_of:
            return followed, scatter(followed.norms, client)
    return None


def _entry(followed: Followed, facts: RoundFacts, ticket: TicketFacts, norm: Norm | None) -> Entry:
    return Entry(
        followed.run,
        followed.name,
        facts.number,
        ticket,
        norm.ratio if norm else None,
        norm.is_odd if norm else False,
    )
