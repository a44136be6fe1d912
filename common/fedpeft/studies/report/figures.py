"""Figures of a study: accuracy against bytes and rounds, the outcome with its intervals, and the clients' labels.

Lines are points of the first axis; every combination of the other axes is a panel. Of many, a figure shows some, and
says so (`fedpeft.studies.report.selection`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedpeft.studies.report.selection import MOST_OUTCOMES, for_curves, furthest, line_of, panel_of
from fedpeft.studies.results import Estimate, Group, StudyResult, estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS_A_ROW = 3
MOST_DIVISIONS = 6
"""Divisions of data whose labels are shown; the first seed's of each."""
PANEL_INCHES = (4.2, 3.2)
WIDE = 20.0
"""From this ratio of the largest to the smallest bytes on the axis is logarithmic."""
MEGA = 1_000_000
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
"""Of Okabe and Ito: told apart with any colour vision."""
STYLES = ("-", "--")
"""Of lines: the second where all colours are taken."""
MOST_BANDS = 8
"""Lines with their intervals; of more, intervals would cover the lines."""
KEY_INCHES, LETTER_INCHES = 0.5, 0.065
"""Width of a legend's entry beside its name, and of a letter of it."""
LONGEST_NAME, SHORTEST_NAME = 48, 12
"""Characters of a name in a figure, and of a part of one."""

Panels = Mapping[str, Sequence[Group]]


@dataclass(frozen=True)
class Drawn:
    """A figure.

    Attributes:
        figure: Of matplotlib.
        note: A sentence about what it leaves out, which stands in it too; empty if nothing.
    """

    figure: Figure
    note: str


def figures_of(study: StudyResult) -> dict[str, Drawn]:
    """Returns the figures by name; none of what there is nothing to show."""
    return {**_scored(study), **_divided(study)}


def _scored(study: StudyResult) -> dict[str, Drawn]:
    """Returns the figures of accuracies; none if nothing was scored."""
    groups = [group for group in study.groups if group.mean_curve()]
    if not groups:
        return {}
    curves, outcomes = for_curves(groups), furthest(groups, MOST_OUTCOMES, "outcome.csv")
    panels = _panels(curves.groups)
    names = list(dict.fromkeys(map(line_of, (*curves.groups, *outcomes.groups))))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    styles = {name: STYLES[i // len(COLOURS) % len(STYLES)] for i, name in enumerate(names)}
    lines = {name: (colours[name], styles[name]) for name in map(line_of, curves.groups)}
    bare = f"lines without their intervals, being more than {MOST_BANDS}" if len(lines) > MOST_BANDS else ""
    note = "; ".join(filter(None, (curves.note, bare)))
    moved = _curves(panels, lines, "payload, up and down, all clients (MB)", lambda _, b: b / MEGA)
    rounds = _curves(panels, lines, "rounds", lambda version, _: float(version))
    return {
        "accuracy-bytes": _noted(moved, note),
        "accuracy-rounds": _noted(rounds, note),
        "outcome": _noted(_outcome(outcomes.groups, colours), outcomes.note),
    }


def _noted(figure: Figure, note: str) -> Drawn:
    """Returns a figure with a note in it, so that it says the same without a page around it."""
    if note:
        figure.supxlabel(note, fontsize=7, color="#5b6470")
    return Drawn(figure, note)


def png(figure: Figure) -> bytes:
    """Returns a figure as PNG, the same bytes for the same results."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def svg(figure: Figure) -> str:
    """Returns a figure as SVG, the same text for the same results."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fedpeft", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _named(*points: str) -> str:
    """Returns points as one name, in which matplotlib finds no formula; each is cut to its share of the room."""
    room = max(LONGEST_NAME // max(len(points), 1), SHORTEST_NAME)
    return ", ".join(_cut(point, room) for point in points).replace("$", r"\$")


def _cut(text: str, room: int) -> str:
    """Returns a text in so many characters; both ends stay, for names often differ in one of them."""
    if len(text) <= room:
        return text
    return f"{text[: (room - 1) // 2 + 1]}\u2026{text[len(text) - (room - 2) // 2 :]}"


def _panels(groups: Sequence[Group]) -> Panels:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(panel_of(group), []).append(group)
    return found


def _figure(panels: int, *, share: bool = True) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, PANELS_A_ROW)
    rows = math.ceil(panels / columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(max(columns * width, 6.5), rows * height + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=share)
    flat = list(axes.flat)
    for spare in flat[panels:]:
        spare.set_visible(False)
    return figure, flat[:panels]


def _curves(
    panels: Panels, lines: Mapping[str, tuple[str, str]], label: str, across: Callable[[int, float], float]
) -> Figure:
    """Returns a panel for each combination, with a line and its interval for each point of the first axis."""
    figure, axes = _figure(len(panels))
    for axis, groups in zip(axes, panels.values(), strict=True):
        furthest = []
        for group in groups:
            curve = group.mean_curve()
            xs = [across(version, moved) for version, moved, _ in curve]
            ys = [100 * found.mean for _, _, found in curve]
            (colour, style), name = lines[line_of(group)], _named(line_of(group))
            axis.plot(xs, ys, style, color=colour, label=name, linewidth=1.5, marker=".", markersize=4)
            furthest.append(max(xs))
            if len(lines) > MOST_BANDS:
                continue
            low = [100 * max(found.mean - (found.half_width or 0.0), 0.0) for _, _, found in curve]
            high = [100 * min(found.mean + (found.half_width or 0.0), 1.0) for _, _, found in curve]
            axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        if min(furthest) > 0 and max(furthest) / min(furthest) > WIDE:
            axis.set_xscale("symlog", linthresh=min(furthest) / 10)
        axis.set_title(_named(*list(groups[0].points.values())[1:]), fontsize=9)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel(label, fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("accuracy (%)", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    for other in axes[1:]:
        for handle, name in zip(*other.get_legend_handles_labels(), strict=True):
            if name not in labels:
                handles, labels = [*handles, handle], [*labels, name]
    entry = KEY_INCHES + LETTER_INCHES * max(map(len, labels))
    columns = max(1, min(len(labels), 5, int(figure.get_figwidth() / entry)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=8, frameon=False)
    return figure


def _outcome(groups: Sequence[Group], colours: Mapping[str, str]) -> Figure:
    """Returns the accuracy of the newest version of every combination, with its interval."""
    figure, (axis,) = _figure(1)
    figure.set_size_inches(7.5, 0.9 + 0.32 * len(groups))
    for place, group in enumerate(reversed(groups)):
        found: Estimate | None = estimate(group.by_seed("accuracy").values())
        if found is None:
            continue
        colour = colours[line_of(group)]
        axis.errorbar(
            100 * found.mean,
            place,
            xerr=100 * (found.half_width or 0.0),
            fmt="o",
            color=colour,
            capsize=3,
            markersize=5,
        )
        seeds = [100 * value for value in group.by_seed("accuracy").values()]
        axis.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=9, alpha=0.6)
    axis.set_yticks(
        range(len(groups)), [_named(*group.points.values()) or group.label for group in reversed(groups)], fontsize=8
    )
    axis.set_xlabel("accuracy of the newest version (%): mean, 95 % interval, seeds", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3, axis="x")
    axis.set_ylim(-0.6, len(groups) - 0.4)
    return figure


def _divided(study: StudyResult) -> dict[str, Drawn]:
    """Returns the labels of each client, a panel for each division of the data that occurs."""
    found: dict[tuple[str, tuple[str, ...]], list[list[int]]] = {}
    for cell in study.cells:
        division = (cell.report or {}).get("partition") or {}
        if division.get("histogram"):
            title = f"{division['variant']}" + (f", alpha {division['alpha']:g}" if division["alpha"] else "")
            clients = int(division["skew"]["clients"])
            size = f"{division['rows']:,} examples, {len(division['classes'])} classes, {clients} clients"
            found.setdefault((f"{title}\n{size}", tuple(division["classes"])), list(division["histogram"].values()))
    if not found:
        return {}
    shown = list(found.items())[:MOST_DIVISIONS]
    note = f"{len(shown)} of {len(found)} divisions, the first ones" if len(shown) < len(found) else ""
    figure, axes = _figure(len(shown), share=False)
    for axis, ((title, _), counts) in zip(axes, shown, strict=True):
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("class", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("client", fontsize=9)
    return {"labels": _noted(figure, note)}
