"""Selection of what one figure and one page show of many combinations; the CSV files have all of them.

Shown are those that got furthest, by the accuracy of the newest version, in the order of the study; the first ones
where nothing was scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedpeft.formatting import counted
from fedpeft.studies.results import Group, StudyResult

MOST_LINES = 16
"""Lines in a panel: points of the first axis."""
MOST_PANELS = 12
"""Panels of a figure: combinations of the other axes."""
MOST_OUTCOMES = 40
"""Combinations in the figure of outcomes."""
MOST_ROWS = 100
"""Combinations in a table of the page, and cells in its lists."""


@dataclass(frozen=True)
class Selection:
    """Some combinations, and a sentence about those that are left out.

    Attributes:
        groups: The combinations.
        note: The sentence; empty if there are no others.
    """

    groups: tuple[Group, ...]
    note: str


def line_of(group: Group) -> str:
    """Returns the name of a combination's line: its point of the first axis."""
    return next(iter(group.points.values()), "all")


def panel_of(group: Group) -> str:
    """Returns the name of a combination's panel: its points of the other axes."""
    return ", ".join(list(group.points.values())[1:])


def for_curves(groups: Sequence[Group]) -> Selection:
    """Returns what a figure of curves shows: the lines and the panels whose best combination got furthest."""
    lines, panels = _best(groups, line_of, MOST_LINES), _best(groups, panel_of, MOST_PANELS)
    shown = tuple(group for group in groups if line_of(group) in lines and panel_of(group) in panels)
    left_out = [
        f"{len(kept)} of {len(there):,} {what}"
        for kept, there, what in (
            (lines, {line_of(group) for group in groups}, "lines"),
            (panels, {panel_of(group) for group in groups}, "panels"),
        )
        if len(kept) < len(there)
    ]
    return Selection(
        shown, f"{' and '.join(left_out)}, those that got furthest; curves.csv has all" if left_out else ""
    )


def furthest(groups: Sequence[Group], most: int, file: str) -> Selection:
    """Returns so many combinations that got furthest; the note names the file that has all."""
    if len(groups) <= most:
        return Selection(tuple(groups), "")
    by_accuracy = sorted(range(len(groups)), key=lambda at: -_accuracy(groups[at]))
    shown = tuple(groups[at] for at in sorted(by_accuracy[:most]))
    of = counted(len(groups), "combination")
    return Selection(shown, f"{most} of {of}, those that got furthest; {file} has all")


def for_page(study: StudyResult) -> Selection:
    """Returns what the tables of a page show."""
    return furthest(study.groups, MOST_ROWS, "each table's CSV file")


def _best(groups: Sequence[Group], name: Callable[[Group], str], most: int) -> set[str]:
    """Returns the names whose best combination got furthest."""
    best: dict[str, float] = {}
    for group in groups:
        best[name(group)] = max(best.get(name(group), -math.inf), _accuracy(group))
    return set(sorted(best, key=lambda each: -best[each])[:most])


def _accuracy(group: Group) -> float:
    """Returns the mean accuracy of a combination's newest versions; that of one that was not scored is below all."""
    found = group.by_seed("accuracy").values()
    return math.fsum(found) / len(found) if found else -math.inf
