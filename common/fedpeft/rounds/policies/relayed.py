"""Relayed rounds: those of an edge, which adds up its clients' updates for a parent's server."""

from __future__ import annotations

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault
from fedpeft.rounds.policies import policies
from fedpeft.rounds.policies.synchronous import Synchronous


class Relayed(Synchronous):
    """Synchronous rounds that make a sum each, and no version: that comes from the parent, as do the rounds' numbers.

    A round opens once the version before it is there.
    """

    makes_versions = False

    def misfit(self, config: RunConfig, spec: AdapterSpec) -> Fault | None:
        """See `RoundPolicy.misfit`."""
        if not config.aggregation.exact_sum:
            return "aggregation.exact_sum", "must be true: a parent adds up sums of its children"
        return None


policies.register("relayed")(Relayed())
