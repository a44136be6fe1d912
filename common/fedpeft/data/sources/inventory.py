"""Inventory of a data folder: how many entries were taken, how many not and why; the same words wherever it is said."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from fedpeft.data.sources.file_names import shown

EXAMPLES = 3
"""Entries named for each reason."""
SHOWN_REASONS = 20
"""Reasons that are listed; there may be as many as suffixes."""


class Fate(StrEnum):
    """Fate of an entry of a folder."""

    TAKEN = "taken"
    UNREADABLE = "unreadable"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a folder.

    Attributes:
        path: Its path below the folder, as the system names it.
        group: The class whose folder it is in; empty if it is in none.
        fate: Its use: an image, an image that cannot be read, or nothing that is read.
        reason: Reason for which it is not taken; empty if it is.
    """

    path: str
    group: str
    fate: Fate
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Entries that are not taken for one reason.

    Attributes:
        reason: The reason.
        count: Number of files.
        examples: The first, printable.
    """

    reason: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        more = self.count - len(self.examples)
        return f"{self.reason}: {self.count:,} ({', '.join(self.examples)}{f' and {more:,} more' if more else ''})"


@dataclass(frozen=True)
class Inventory:
    """Entries that were found in a folder, by fate.

    Attributes:
        taken: Number of entries that are images.
        unreadable: Images that cannot be read, the most frequent reason first.
        skipped: Entries that are not read, likewise.
    """

    taken: int = 0
    unreadable: tuple[Group, ...] = ()
    skipped: tuple[Group, ...] = ()

    def with_unreadable(self, name: str, reason: str, taken: int = 0) -> Inventory:
        """Returns it with one more image that cannot be read.

        Args:
            name: The image's name.
            reason: Reason for which it cannot be read.
            taken: Entries that were counted as taken for it.
        """
        return Inventory.sum((self, Inventory(-taken, (Group(reason, 1, (shown(name),)),))))

    def lines(self) -> list[str]:
        """Returns what is said of it, a line a reason; none if everything was taken."""
        return [*_lines("cannot be read", self.unreadable), *_lines("skipped", self.skipped)]

    def as_dict(self) -> dict[str, Any]:
        """Returns it for JSON: `taken`, and under `unreadable` and `skipped` [reason, count, examples] of each."""
        groups = {"unreadable": self.unreadable, "skipped": self.skipped}
        return {"taken": self.taken} | {
            fate: [{"reason": g.reason, "count": g.count, "examples": list(g.examples)} for g in some]
            for fate, some in groups.items()
        }

    @classmethod
    def sum(cls, inventories: Iterable[Inventory]) -> Self:
        """Returns the inventory of several folders together."""
        tally = Tally()
        for each in inventories:
            tally.taken += each.taken
            for fate, groups in ((Fate.UNREADABLE, each.unreadable), (Fate.SKIPPED, each.skipped)):
                for group in groups:
                    tally.include(fate, group)
        whole = tally.inventory()
        return cls(whole.taken, whole.unreadable, whole.skipped)

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> Self:
        """Returns what `as_dict` wrote."""
        unreadable, skipped = (
            tuple(Group(each["reason"], each["count"], tuple(each["examples"])) for each in data[fate])
            for fate in ("unreadable", "skipped")
        )
        return cls(data["taken"], unreadable, skipped)


EMPTY = Inventory()
"""Of data that are no folder."""


@dataclass
class Tally:
    """Counts entries, of which there may be millions, one by one."""

    taken: int = 0
    _found: dict[tuple[Fate, str], tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Takes one entry."""
        if entry.fate is Fate.TAKEN:
            self.taken += 1
            return
        count, examples = self._found.get((entry.fate, entry.reason), (0, []))
        if count < EXAMPLES:
            examples.append(shown(entry.path))
        self._found[entry.fate, entry.reason] = count + 1, examples

    def include(self, fate: Fate, group: Group) -> None:
        """Takes what was counted elsewhere."""
        count, examples = self._found.get((fate, group.reason), (0, []))
        examples += group.examples[: max(EXAMPLES - count, 0)]
        self._found[fate, group.reason] = count + group.count, examples

    def inventory(self) -> Inventory:
        """Returns what was counted so far."""
        return Inventory(self.taken, self._groups(Fate.UNREADABLE), self._groups(Fate.SKIPPED))

    def _groups(self, fate: Fate) -> tuple[Group, ...]:
        found = [Group(reason, n, tuple(some)) for (f, reason), (n, some) in self._found.items() if f is fate]
        return tuple(sorted(found, key=lambda group: (-group.count, group.reason)))


def inventory_of(entries: Iterable[Entry]) -> Inventory:
    """Counts entries."""
    tally = Tally()
    for entry in entries:
        tally.add(entry)
    return tally.inventory()


def _lines(fate: str, groups: tuple[Group, ...]) -> list[str]:
    lines = [f"{fate}, {group}" for group in groups[:SHOWN_REASONS]]
    rest = groups[SHOWN_REASONS:]
    if rest:
        lines.append(f"{fate}, {len(rest):,} other reasons: {sum(g.count for g in rest):,}")
    return lines
