"""Tables of a study as values: one heading a column, one row a combination of points; CSV and LaTeX of them."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft import formatting
from fedpeft.studies.results import Estimate, Group, StudyResult, accuracy_within, estimate, until

NONE = "-"
MEGA = 1_000_000


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: Of its file, without an ending.
        caption: A sentence.
        columns: The headings.
        rows: Text, as many a row as there are headings.
        texts: Number of first columns that are no figures.
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int

    def of(self, groups: Sequence[Group]) -> tuple[tuple[str, ...], ...]:
        """Returns the rows of some combinations."""
        wanted = {tuple(group.points.values()) for group in groups}
        return tuple(row for row in self.rows if row[: self.texts] in wanted)


def tables_of(study: StudyResult) -> list[Table]:
    """Returns the tables of a study, without those that would say nothing."""
    found = [outcome(study), _budgets(study), _target(study), _clients(study), _distances(study), _skew(study)]
    return [table for table in found if table is not None]


def curves_csv(study: StudyResult) -> str:
    """Returns one line for every version of every cell: what a plot or a data frame starts from."""
    columns = [*study.about["axes"], "seed", "version", "payload_bytes", "seconds", "accuracy", "loss", "key"]
    return _csv(
        columns,
        ([*cell.points.values(), cell.seed, *row.values(), cell.key] for cell in study.cells for row in cell.rows),
    )


def cells_csv(study: StudyResult) -> str:
    """Returns one line for every cell: its folder, its newest version, and why it has none."""
    columns = [*study.about["axes"], "seed", "key", "accuracy", "seconds", "failure"]
    rows = []
    for cell in study.cells:
        last = cell.curve[-1] if cell.curve else None
        found = (None, None) if last is None else (last.accuracy, round(last.seconds, 3))
        why = "" if cell.report else cell.failure or "not executed"
        rows.append([*cell.points.values(), cell.seed, cell.key, *found, why])
    return _csv(columns, rows)


def as_csv(table: Table) -> str:
    """Returns a table, all of its rows."""
    return _csv(table.columns, table.rows)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return stream.getvalue()


def as_latex(table: Table) -> str:
    """Returns a table for LaTeX with the package booktabs."""
    lines = [
        f"% {table.caption}",
        rf"\begin{{tabular}}{{{'l' * table.texts}{'r' * (len(table.columns) - table.texts)}}}",
        r"\toprule",
        " & ".join(map(_latex, table.columns)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_latex, row)) + r" \\" for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        **{each: rf"\{each}" for each in "&%$#_{}"},
    }
)


def _latex(text: str) -> str:
    return text.translate(_LATEX)


def outcome(study: StudyResult) -> Table:
    """Returns the table of the newest version of every combination."""
    rows = []
    for group in study.groups:
        accuracy, loss = (estimate(group.by_seed(figure).values()) for figure in ("accuracy", "loss"))
        reports = [cell.report for cell in group.cells if cell.report]
        rows.append(
            (
                *group.points.values(),
                _seeds(group, accuracy),
                _each(reports, "adapter_parameters", "{:,.0f}"),
                percentage(accuracy),
                plain(loss, 3),
                _sum(reports, "payload_bytes_up"),
                _sum(reports, "payload_bytes_down"),
                plain(estimate(cell.curve[-1].seconds for cell in group.cells), 0),
            )
        )
    columns = ("seeds", "tuned", "accuracy, %", "loss", "MB up", "MB down", "seconds")
    caption = (
        "The newest version: mean over seeds, those with an accuracy, ± half the 95 % confidence interval (Student's "
        "t); bytes of the encoded tensors."
    )
    return _table(study, "outcome", caption, columns, rows)


def _budgets(study: StudyResult) -> Table | None:
    """Accuracy under budgets of bytes."""
    budgets = study.about["budgets_bytes"]
    if not budgets:
        return None
    rows = [
        (*group.points.values(), *(percentage(_within(group, budget)) for budget in budgets)) for group in study.groups
    ]
    columns = tuple(f"{budget / MEGA:g} MB" for budget in budgets)
    caption = "Accuracy in % of the last version that a budget of bytes, up and down of all clients, pays for."
    return _table(study, "budgets", caption, columns, rows)


def _target(study: StudyResult) -> Table | None:
    """Bytes and seconds to a target."""
    target = study.about["target"]
    if target is None:
        return None
    rows = []
    for group in study.groups:
        reached = [point for cell in group.cells if (point := until(cell.curve, target)) is not None]
        rows.append(
            (
                *group.points.values(),
                f"{len(reached)} of {len(group.cells)}",
                plain(estimate(point.version for point in reached), 1),
                plain(estimate(point.bytes / MEGA for point in reached), 3),
                plain(estimate(point.seconds for point in reached), 0),
            )
        )
    caption = (
        f"Until an accuracy of {formatting.percent(target)}: rounds, bytes and seconds, of the seeds that reached it."
    )
    return _table(study, "target", caption, ("reached", "rounds", "MB", "seconds"), rows)


def _clients(study: StudyResult) -> Table | None:
    """Differences between the clients of the last round."""
    rows = []
    for group in study.groups:
        spreads = [spread for cell in group.cells if (spread := _spread(cell.report or {})) is not None]
        if not spreads:
            continue
        rows.append((*group.points.values(), *(plain(estimate(each), 3) for each in zip(*spreads, strict=True))))
    if not rows:
        return None
    columns = ("training loss", "smallest", "largest", "std", "std of norms / mean")
    caption = "Clients of the last round: mean, range and deviation of their training losses, deviation of their norms."
    return _table(study, "clients", caption, columns, rows)


def _spread(report: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Returns mean, range and deviation of the clients' losses, and the relative deviation of their norms."""
    counted = [t for row in report.get("rounds", [])[-1:] for t in row.get("tickets", []) if t["state"] == "received"]
    losses = [loss for ticket in counted if (loss := ticket.get("metrics", {}).get("loss")) is not None]
    norms = [ticket.get("update_norm", 0.0) for ticket in counted]
    if not losses or not any(norms):
        return None
    mean = statistics.fmean(losses)
    relative = statistics.pstdev(norms) / statistics.fmean(norms)
    return mean, min(losses), max(losses), statistics.pstdev(losses), relative


def _distances(study: StudyResult) -> Table | None:
    """Squared distances of Theorem 1."""
    parts = ("backbone", "head", "added")
    rows, known = [], False
    for group in study.groups:
        found = [each for c in group.cells if (each := (c.report or {}).get("squared_distances"))]
        known = known or bool(found)
        rows.append((*group.points.values(), *(plain(estimate(each[part] for each in found), 3) for part in parts)))
    if not known:
        return None
    caption = "Squared distances that tensors travelled (Theorem 1): pre-trained ones, the head, those that were added."
    return _table(study, "distances", caption, parts, rows)


def _skew(study: StudyResult) -> Table | None:
    """Heterogeneity of the clients' data as they read it."""
    figures = {
        "clients": "{:.0f}",
        "total_variation": "{:.3f}",
        "jensen_shannon": "{:.3f}",
        "classes_per_client": "{:.1f}",
        "gini": "{:.3f}",
        "effective_clients": "{:.1f}",
    }
    rows, divided = [], False
    for group in study.groups:
        found = [
            cell.report["partition"]["skew"] for cell in group.cells if cell.report and cell.report.get("partition")
        ]
        divided = divided or bool(found)
        rows.append((*group.points.values(), *(_each(found, name, form) for name, form in figures.items())))
    if not divided:
        return None
    columns = ("clients", "total variation", "Jensen-Shannon", "classes a client", "Gini of sizes", "effective clients")
    return _table(study, "skew", "Heterogeneity of the rows that clients trained on, mean over seeds.", columns, rows)


def _table(
    study: StudyResult, name: str, caption: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]
) -> Table:
    axes = tuple(study.about["axes"])
    return Table(name, caption, (*axes, *columns), tuple(rows), len(axes))


def _seeds(group: Group, accuracy: Estimate | None) -> str:
    """Returns the number of seeds that the accuracy is of, beside that of all where some have none."""
    found = len(group.cells) if accuracy is None else accuracy.count
    wanted = len(group.cells) + group.missing
    return str(found) if found == wanted else f"{found} of {wanted}"


def _within(group: Group, budget_bytes: int) -> Estimate | None:
    found = (accuracy_within(cell.curve, budget_bytes) for cell in group.cells)
    return estimate(accuracy for accuracy in found if accuracy is not None)


def _each(reports: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    found = [report[key] for report in reports if report.get(key) is not None]
    return form.format(sum(found) / len(found)) if found else NONE


def _sum(reports: Sequence[Mapping[str, Any]], key: str) -> str:
    """Returns the mean over seeds of the bytes of all rounds, in MB."""
    return plain(estimate(sum(row[key] for row in report["rounds"]) / MEGA for report in reports), 3)


def percentage(found: Estimate | None) -> str:
    """Returns an estimate of a share of 1 in per cent, `71.3 ± 1.2`; a dash if there is none."""
    if found is None:
        return NONE
    wide = None if found.half_width is None else 100 * found.half_width
    return plain(Estimate(100 * found.mean, wide, found.count), 1)


def plain(found: Estimate | None, digits: int) -> str:
    """Returns an estimate with so many digits after the point; its interval if it has a width that shows."""
    if found is None:
        return NONE
    mean = f"{found.mean:,.{digits}f}"
    if found.half_width is None or round(found.half_width, digits) == 0:
        return mean
    return f"{mean} ± {found.half_width:,.{digits}f}"
