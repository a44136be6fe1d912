"""Section `[rounds]` of the run file."""

from __future__ import annotations

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from fedpeft.config.section import Section, known_in
from fedpeft.formatting import counted
from fedpeft.registry import registry_of

DEFAULT_POLICY = "synchronous"
"""The policy of rounds where none is given."""
DEFAULT_WAIT_S = 7 * 86_400.0
"""`wait_s` where it is not given."""
LEAST_DEADLINE_S = 0.1
"""Shortest `deadline_s`."""
DEFAULT_STALENESS = 10
"""`max_staleness` where it is not given."""


def default_quorum(clients: int) -> int:
    """Returns the quorum of a run that names none: three quarters, rounded up, and one fewer than two or three."""
    return max(1, min(clients - 1, -(-3 * clients // 4)))


class RoundsConfig(Section):
    """`[rounds]`: how many rounds, of how many clients, and when a round closes."""

    count: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Number of rounds."""
    clients: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Clients whose updates a round wants."""
    quorum: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Fewest updates a round commits with at its deadline; if absent three quarters of `clients`, 1 of 2, 2 of 3."""
    min_available: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Clients that must wait before any are sampled; if absent as many as are sampled, after a minute the quorum. In
    buffered rounds for the first version only."""
    deadline_s: Annotated[float, Field(ge=LEAST_DEADLINE_S, le=30 * 86_400)] = 600.0
    """Seconds from a round's opening to its deadline; in buffered rounds also those for which a client that trains has
    its place."""
    over_selection: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of clients sampled beyond `clients`; the round closes once `clients` updates are there."""
    max_extensions: Annotated[int, Field(ge=0, le=1000)] = 3
    """Deadlines a round may miss without a quorum before the run is paused."""
    wait_s: Annotated[float, Field(ge=1.0, le=366 * 86_400)] | None = None
    """Seconds that a round waits for enough clients to open, before the run is paused; if absent a week."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the run: sampling, initialisation and local training derive from it."""
    policy: Annotated[str, known_in("fedpeft.rounds.policies")] | None = None
    """synchronous (if absent): a round's updates all start from the version before it. buffered: `concurrency` clients
    always train, and the next `clients` updates that come make a version, whichever version they start from. relayed:
    a round makes a sum for a parent's server, and the versions come from there (an edge's agent makes such runs)."""
    concurrency: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Clients that train at once in buffered rounds; if absent as many as `clients` and `over_selection` say."""
    max_staleness: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Versions that may be made while a client trains before its update is late, in buffered rounds; if absent 10."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = (key for key in ("concurrency", "max_staleness") if getattr(self, key) is not None)
        for key in given:  # as a rule there is none, and no policy need be imported
            if key not in registry_of("fedpeft.rounds.policies").get(self.policy_name).settings:
                raise ValueError(f'{key} is not a setting of rounds with policy = "{self.policy_name}"')
        if self.quorum is not None and self.quorum > self.clients:
            raise ValueError(f"quorum {self.quorum} is more than clients {self.clients}")
        if self.min_available is not None and self.min_available < self.needed:
            wanted = counted(self.needed, "update")
            raise ValueError(f"min_available {self.min_available} is less than the {wanted} that a round needs")
        return self

    @property
    def sampled(self) -> int:
        """Clients given a ticket when a round opens; in buffered rounds those that train at once."""
        return self.concurrency or math.ceil(self.clients * (1 + self.over_selection))

    @property
    def policy_name(self) -> str:
        """The registered policy of the rounds."""
        return self.policy or DEFAULT_POLICY

    @property
    def most_stale(self) -> int:
        """Most versions that an update may be behind."""
        return DEFAULT_STALENESS if self.max_staleness is None else self.max_staleness

    @property
    def longest_wait_s(self) -> float:
        """Seconds that a round waits for enough clients to open."""
        return DEFAULT_WAIT_S if self.wait_s is None else self.wait_s

    @property
    def needed(self) -> int:
        """Updates a round commits with at its deadline."""
        return self.quorum or default_quorum(self.clients)

    @property
    def available(self) -> int:
        """Clients with which a round opens as soon as they wait."""
        return self.min_available or self.sampled

    @property
    def least_available(self) -> int:
        """Clients with which a round opens if no more come for a while."""
        return self.min_available or self.needed
