"""The clients that are set aside in a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft.v1 import run_pb2
from fedpeft_operator.console.feeds.facts import RoundFacts

MOST = 50
"""Clients that a page lists."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """A client that is set aside.

    Attributes:
        client: Its id.
        round: The round of its last refused or excluded update; None if none is known.
        reason: Reason of that one, as its ticket says it.
    """

    client: str
    round: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Aside:
    """The clients that are set aside in a run.

    Attributes:
        clients: Those listed, by id.
        hidden: Number of those that are not shown.
    """

    clients: tuple[SetAside, ...]
    hidden: int


def set_aside(run: run_pb2.Run, rounds: Sequence[RoundFacts]) -> Aside:
    """Returns the clients that are set aside in a run, each with what happened last."""
    listed = run.set_aside[:MOST]
    last: dict[str, SetAside] = {}
    wanted = set(listed)
    for facts in reversed(rounds):
        if not wanted:
            break
        for ticket in (*facts.of("refused"), *facts.of("excluded")):
            if ticket.client in wanted:
                wanted.remove(ticket.client)
                last[ticket.client] = SetAside(ticket.client, facts.number, ticket.reason)
    return Aside(
        tuple(last.get(client, SetAside(client, None, "")) for client in listed), max(0, len(run.set_aside) - MOST)
    )
