"""Synchronous rounds: all updates of a round start from the version before it."""

from __future__ import annotations

from fedpeft.config import RoundsConfig
from fedpeft.rounds.policies import RoundPolicy, policies
from fedpeft.rounds.state_machine import Round
from fedpeft.rounds.tickets import TicketState


class Synchronous(RoundPolicy):
    """A sample of the clients works for one round; whoever is late when it closes has worked in vain.

    After an extension, replacements are sampled beside the stragglers, whose tickets stay good.
    """

    def wanted(self, state: Round, config: RoundsConfig, now: float) -> int:
        """See `RoundPolicy.wanted`."""
        at_work = state.tickets.number_of_generation(TicketState.ISSUED, state.extensions)
        return config.sampled - state.tickets.number(TicketState.RECEIVED) - at_work


policies.register("synchronous")(Synchronous())
