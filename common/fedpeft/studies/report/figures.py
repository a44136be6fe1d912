"""Figures of a study: accuracy against bytes and rounds, the outcome with its intervals, and the clients' labels.

Lines are points of the first axis; every combination of the other axes is a panel.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

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

Panels = Mapping[str, Sequence[Group]]


def figures_of(study: StudyResult) -> dict[str, Figure]:
    """Returns the figures by name; none of what there is nothing to show."""
    return {**_scored(study), **_divided(study)}


def _scored(study: StudyResult) -> dict[str, Figure]:
    """Returns the figures of accuracies; none if nothing was scored."""
    groups = [group for group in study.groups if group.mean_curve()]
    if not groups:
        return {}
    panels = _panels(groups)
    colours = {first: COLOURS[i % len(COLOURS)] for i, first in enumerate(dict.fromkeys(map(_line, groups)))}
    return {
        "accuracy-bytes": _curves(panels, colours, "payload, up and down, all clients (MB)", lambda _, b: b / MEGA),
        "accuracy-rounds": _curves(panels, colours, "rounds", lambda version, _: float(version)),
        "outcome": _outcome(groups, colours),
    }


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


def _line(group: Group) -> str:
    return next(iter(group.points.values()), "all")


def _plain(text: str) -> str:
    """Returns text in which matplotlib finds no formula."""
    return text.replace("$", r"\$")


def _panels(groups: Sequence[Group]) -> Panels:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(", ".join(list(group.points.values())[1:]), []).append(group)
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


def _curves(panels: Panels, colours: Mapping[str, str], label: str, across: Callable[[int, float], float]) -> Figure:
    """Returns a panel for each combination, with a line and its interval for each point of the first axis."""
    figure, axes = _figure(len(panels))
    for axis, (title, groups) in zip(axes, panels.items(), strict=True):
        furthest = []
        for group in groups:
            curve = group.mean_curve()
            xs = [across(version, moved) for version, (moved, _) in enumerate(curve)]
            ys = [100 * found.mean for _, found in curve]
            axis.plot(
                xs, ys, color=colours[_line(group)], label=_plain(_line(group)), linewidth=1.5, marker=".", markersize=4
            )
            low = [100 * max(found.mean - (found.half_width or 0.0), 0.0) for _, found in curve]
            high = [100 * min(found.mean + (found.half_width or 0.0), 1.0) for _, found in curve]
            axis.fill_between(xs, low, high, color=colours[_line(group)], alpha=0.15, linewidth=0)
            furthest.append(max(xs))
        if min(furthest) > 0 and max(furthest) / min(furthest) > WIDE:
            axis.set_xscale("symlog", linthresh=min(furthest) / 10)
        axis.set_title(_plain(title), fontsize=9)
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
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 5), fontsize=8, frameon=False)
    return figure


def _outcome(groups: Sequence[Group], colours: Mapping[str, str]) -> Figure:
    """Returns the accuracy of the newest version of every combination, with its interval."""
    figure, (axis,) = _figure(1)
    figure.set_size_inches(7.5, 0.9 + 0.32 * len(groups))
    for place, group in enumerate(reversed(groups)):
        found: Estimate | None = estimate(group.by_seed("accuracy").values())
        if found is None:
            continue
        colour = colours[_line(group)]
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
    axis.set_yticks(range(len(groups)), [_plain(group.label) for group in reversed(groups)], fontsize=8)
    axis.set_xlabel("accuracy of the newest version (%): mean, 95 % interval, seeds", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(alpha=0.3, axis="x")
    axis.set_ylim(-0.6, len(groups) - 0.4)
    return figure


def _divided(study: StudyResult) -> dict[str, Figure]:
    """Returns the labels of each client, a panel for each division of the data that occurs."""
    found: dict[str, tuple[str, list[list[int]]]] = {}
    for cell in study.cells:
        division = (cell.report or {}).get("partition") or {}
        if division.get("histogram"):
            title = f"{division['variant']}" + (f", alpha {division['alpha']:g}" if division["alpha"] else "")
            found.setdefault(title, (title, list(division["histogram"].values())))
    shown = list(found.values())[:MOST_DIVISIONS]
    if not shown:
        return {}
    figure, axes = _figure(len(shown), share=False)
    for axis, (title, counts) in zip(axes, shown, strict=True):
        shares = [[count / max(1, sum(row)) for count in row] for row in counts]
        axis.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(_plain(title), fontsize=9)
        axis.set_xlabel("class", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("client", fontsize=9)
    return {"labels": figure}
