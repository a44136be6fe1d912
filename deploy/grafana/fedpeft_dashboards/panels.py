"""Common parts of the dashboards: variables, and a handful of panels, each with a sentence on what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import (
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = models.DataSourceRef(type_val="prometheus", uid="$datasource")
TAG = "fedpeft"

DAEMONS = 'job="fedpeft", instance=~"$instance"'
"""Selects the daemons that are chosen above the dashboard."""
RUNS = f'{DAEMONS}, run=~"$run"'
"""Selects the runs that are chosen above the dashboard."""

GREEN, YELLOW, RED = "green", "yellow", "red"


@dataclass(frozen=True)
class Query:
    """A PromQL expression and what its series are called; `{{label}}` stands for a label's value."""

    expr: str
    legend: str


def once(labels: str, metric: str, also: str = "") -> str:
    """Returns the expression for a gauge of runs, once for each value of some labels.

    Every daemon on a database shows the same gauges of its runs, so their greatest stands for all.
    """
    chosen = f"{RUNS}, {also}" if also else RUNS
    return f"max by ({labels}) ({metric}{{{chosen}}})"


def board(uid: str, title: str, what: str, *, of_runs: bool) -> dashboard.Dashboard:
    """Returns a dashboard without panels.

    Args:
        uid: End of its address.
        title: Its name.
        what: Question that it answers.
        of_runs: True if runs can be chosen beside daemons.
    """
    chosen = [_source(), _choice("instance", "Daemon", 'label_values(up{job="fedpeft"}, instance)')]
    if of_runs:
        chosen.append(_choice("run", "Run", f"label_values(fedpeft_round{{{DAEMONS}}}, run)"))
    others = dashboard.DashboardLink("FedPEFT").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(what)
        .tags([TAG])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .variables(chosen)
        .link(others.as_dropdown(False).include_vars(True).keep_time(True))
    )


def _source() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")


def _choice(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def lines(
    title: str,
    what: str,
    unit: str,
    *queries: Query,
    width: int = 12,
    stacked: bool = False,
    limit: float | None = None,
    steps: bool = False,
) -> timeseries.Panel:
    """Returns a panel of lines over time.

    Args:
        title: Its heading.
        what: Explanation of the figures, and of what to make of them.
        unit: Grafana's name of the unit.
        queries: Queries of the lines.
        width: Of 24 columns.
        stacked: True if the lines add up.
        limit: Value of a red line.
        steps: True if values hold until the next one, as states do, instead of being connected.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .unit(unit)
        .axis_soft_min(0)
        .height(8)
        .span(width)
        .line_width(2 if not stacked else 1)
        .fill_opacity(30 if stacked else 0)
        .show_points(common.VisibilityMode.AUTO)
        .line_interpolation(common.LineInterpolation.STEP_AFTER if steps else common.LineInterpolation.LINEAR)
        .stacking(
            common_builders.StackingConfig().mode(common.StackingMode.NORMAL if stacked else common.StackingMode.NONE)
        )
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
            .show_legend(True)
        )
        .tooltip(
            common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
        )
        .thresholds(_limits((None, GREEN)) if limit is None else _limits((None, GREEN), (limit, RED)))
        .targets(_targets(queries))
    )
    if limit is not None:
        style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE)
        panel = panel.thresholds_style(style)
    return panel


def numbers(
    title: str,
    what: str,
    unit: str,
    query: Query,
    *levels: tuple[float | None, str],
    width: int = 6,
) -> stat.Panel:
    """Returns a panel of single numbers as they are now, one for each series.

    Args:
        title: Its heading.
        what: Explanation of the figure, and of what to make of it.
        unit: Grafana's name of the unit.
        query: Query of the figure.
        levels: From which value on it has which colour; the first has no value. Without any it is green.
        width: Of 24 columns.
    """
    return (
        stat.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .unit(unit)
        .height(4)
        .span(width)
        .graph_mode(common.BigValueGraphMode.NONE)
        .text_mode(common.BigValueTextMode.VALUE_AND_NAME)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
        .thresholds(_limits(*(levels or ((None, GREEN),))))
        .targets(_targets([query], instant=True))
    )


def states(title: str, what: str, *queries: Query, width: int = 12) -> statetimeline.Panel:
    """Returns a panel of bars over time: there while a query has the series."""
    return (
        statetimeline.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .height(8)
        .span(width)
        .show_value(common.VisibilityMode.NEVER)
        .thresholds(_limits((None, GREEN)))
        .targets(_targets(queries))
    )


def rows(title: str, what: str, query: Query, columns: Sequence[tuple[str, str]], *, width: int = 24) -> table.Panel:
    """Returns a table of the series as they are now.

    Args:
        title: Its heading.
        what: Explanation of the panel.
        query: A row for each of its series.
        columns: Labels that are shown, with their headings, in order; `Value` is the series' value.
        width: Of 24 columns.
    """
    names = [name for name, _ in columns]
    hidden = [name for name in ("Time", "job", "instance", "__name__", "state", "split") if name not in names]
    organize = models.DataTransformerConfig(
        id_val="organize",
        options={
            "excludeByName": dict.fromkeys(hidden, True),
            "indexByName": {name: place for place, name in enumerate(names)},
            "renameByName": dict(columns),
        },
    )
    return (
        table.Panel()
        .title(title)
        .description(what)
        .datasource(SOURCE)
        .height(6)
        .span(width)
        .unit(units.NoUnit)
        .with_transformation(organize)
        .targets(_targets([query], instant=True, form=PromQueryFormat.TABLE))
    )


def _limits(*levels: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    """Returns colours from values on; a value below the first is the first."""
    steps = [models.Threshold(value=value, color=colour) for value, colour in levels]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _targets(
    queries: Sequence[Query], *, instant: bool = False, form: PromQueryFormat = PromQueryFormat.TIME_SERIES
) -> list[Builder[Dataquery]]:
    made: list[Builder[Dataquery]] = []
    for letter, query in zip(ascii_uppercase[: len(queries)], queries, strict=True):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(letter).format(form)
        made.append(target.instant() if instant else target.range())
    return made
