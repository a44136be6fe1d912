"""Updates that differ from the others of their round: the first sign of a faulty client.

An update stands out if its norm is `FACTOR` times the median of its round or more, or that much less. Where a round has
fewer than `LEAST` updates its own median says nothing, and the median of the last `WINDOW` rounds before it stands in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from fedpeft_operator.console.feeds.facts import RoundFacts

FACTOR = 3.0
LEAST = 3
WINDOW = 20


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm of one update.

    Attributes:
        round: Its round.
        client: Its client.
        norm: Euclidean norm.
        ratio: The norm over the norm that was to be expected; None where nothing is to compare with.
    """

    round: int
    client: str
    norm: float
    ratio: float | None

    @property
    def is_odd(self) -> bool:
        """True if it stands out."""
        return self.ratio is not None and not 1 / FACTOR < self.ratio < FACTOR


def norms(rounds: Sequence[RoundFacts]) -> Iterator[Norm]:
    """Yields every update's norm, by round and client."""
    before: deque[list[float]] = deque(maxlen=WINDOW)
    for facts in rounds:
        counted = [ticket for ticket in facts.tickets if ticket.is_counted]
        own = [ticket.norm for ticket in counted]
        around = own if len(own) >= LEAST else [norm for norms in before for norm in norms]
        expected = median(around) if len(around) >= LEAST else 0.0
        for ticket in counted:
            yield Norm(facts.number, ticket.client, ticket.norm, ticket.norm / expected if expected > 0 else None)
        if own:
            before.append(own)


def times(ratio: float) -> str:
    """Returns a ratio for people: `4.2 times`, `a fifth of`."""
    if ratio >= 1:
        return f"{ratio:.1f} times"
    return "less than 1/1000 of" if ratio < 0.001 else f"1/{1 / ratio:.0f} of"
