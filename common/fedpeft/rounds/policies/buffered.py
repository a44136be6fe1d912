"""Buffered asynchronous rounds: FedBuff (2106.06639)."""

from __future__ import annotations

from fedpeft.config import RoundsConfig
from fedpeft.formatting import counted
from fedpeft.rounds.policies import RoundPolicy, policies
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import Ticket, TicketState


class Buffered(RoundPolicy):
    """A number of clients (`concurrency`) always works; each version is made of the next `clients` updates that come.

    A ticket outlives the round that it was issued in, so an update may start from an earlier version: its staleness is
    the number of versions made since. One that would be more than `max_staleness` behind is late. A client counts once
    a version. One of which nothing comes for `deadline_s` has its place given to another; its ticket stays good.
    """

    one_version = False
    has_clock = True
    settings = frozenset({"concurrency", "max_staleness"})

    def wanted(self, state: Round, config: RoundsConfig, now: float) -> int:
        """See `RoundPolicy.wanted`."""
        at_work = state.in_state(TicketState.ISSUED)
        return config.sampled - sum(now < ticket.issued_at + config.deadline_s for ticket in at_work)

    def late_for(self, state: Round, ticket: Ticket, config: RoundsConfig) -> str:
        """See `RoundPolicy.late_for`."""
        if state.number >= config.count:
            return f"version {state.number}, the last one of the run, was made before the update came"
        if state.staleness(ticket) < config.most_stale:
            return ""
        made = counted(config.most_stale, "version")
        return f"more than {made} came after version {ticket.base_version}, from which it starts"


policies.register("buffered")(Buffered())
