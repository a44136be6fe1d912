"""The settings that the daemons on one database must have in common, as they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

_PLACE, _KEPT = "place", "kept"
Key = tuple[str, str, str, float]
"""A subject, its value, words for people, and the time since which all of it holds."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of a daemon that the others must have too.

    Attributes:
        since: Time at which it began, seconds since 1970 by the database's clock.
        places: Its places of adapter versions and of updates: what tells each from all others, and its name.
        kept: Flags that say which files are kept.
    """

    since: float
    places: tuple[tuple[str, str], ...]
    kept: str

    def keys(self) -> list[Key]:
        """Returns it in the form of a notice."""
        places = [(_PLACE, identity, name, self.since) for identity, name in self.places]
        return [*places, (_KEPT, self.kept, "", self.since)]

    @classmethod
    def of(cls, keys: Sequence[Key]) -> Setup:
        """Returns the setup of a notice; subjects that this release does not know are passed over."""
        kept = [value for subject, value, _, _ in keys if subject == _KEPT]
        places = tuple((value, words) for subject, value, words, _ in keys if subject == _PLACE)
        return cls(max((since for *_, since in keys), default=0.0), places, "".join(kept))

    def other_places(self, other: Setup) -> list[tuple[str, str]]:
        """Returns the names of places that differ, here and there."""
        none = "", "none"
        pairs = zip_longest(self.places, other.places, fillvalue=none)
        return [(here[1], there[1]) for here, there in pairs if here[0] != there[0]]
