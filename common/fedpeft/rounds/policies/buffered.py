"""Buffered asynchronous rounds: FedBuff (2106.06639)."""

from __future__ import annotations

from fedpeft.config import RoundsConfig
from fedpeft.rounds.policies import RoundPolicy, policies
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket, TicketState


class Buffered(RoundPolicy):
    """A number of clients (`concurrency`) always works; each version is made of the next `clients` updates that come.

    A ticket outlives the round that it was issued in, so an update may start from an earlier version: its staleness is
    the number of versions made since. One that would be more than `max_staleness` behind is late. A client counts once
    a version.
    """

    one_version = False
    has_clock = True
    settings = frozenset({"concurrency", "max_staleness"})

    def wanted(self, state: Round, config: RoundsConfig) -> int:
        """See `RoundPolicy.wanted`."""
        return config.sampled - state.tickets.number(TicketState.ISSUED)

    def lasts(self, state: Round, ticket: Ticket, config: RoundsConfig) -> bool:
        """See `RoundPolicy.lasts`."""
        return state.staleness(ticket) + 1 <= config.most_stale


policies.register("buffered")(Buffered())
