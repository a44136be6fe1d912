"""Events that a round's state machine takes, and the effects that follow from them: frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from fedpeft.rounds.tickets import Ticket


@dataclass(frozen=True, slots=True)
class Waiting:
    """These clients can be sampled now, those with a larger demerit (`fedpeft.rounds.conduct`) after the others.

    `waited_s` is for how long at least a quorum has been waiting for the round to open.
    """

    clients: AbstractSet[str]
    demerits: Mapping[str, int] = field(default_factory=dict)
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Received:
    """The update of a ticket is durable."""

    ticket: str


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """The client gave its ticket up."""

    ticket: str
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The update of a ticket is wrong for good."""

    ticket: str
    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """Nothing happened but time."""


@dataclass(frozen=True, slots=True)
class Paused:
    """The run was paused: an open round takes what comes, and no deadline runs out meanwhile."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The run was resumed: an open round gets a fresh deadline and its extensions back."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """Received updates that are not folded: the reasons by ticket."""

    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Lost:
    """Received updates whose bytes are not there any more: the reasons by ticket. Their clients send them again."""

    reasons: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The result is durable."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The run goes back to version `to`: the round is over, and nothing of it is folded."""

    to: int


@dataclass(frozen=True, slots=True)
class Supplied:
    """A version of the parent's run is here: rounds up to its number are over, and the one after it may open."""

    version: int


@dataclass(frozen=True, slots=True)
class Differed:
    """The newest version is not the one that the parent's server has by its number: nothing more is to come of it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The run was stopped: nothing more is taken and nothing will be folded, whatever comes after."""

    reason: str = ""


Event = (
    Waiting
    | Received
    | Withdrawn
    | Refused
    | TimePassed
    | Paused
    | Resumed
    | Excluded
    | Lost
    | Aggregated
    | RolledBack
    | Supplied
    | Differed
    | Stopped
)


@dataclass(frozen=True, slots=True)
class Issue:
    """Effect: these tickets are new."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Effect: fold what was received."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Effect: pause the run, because of `reason`."""

    reason: str


Effect = Issue | Aggregate | Pause
