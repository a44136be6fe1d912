"""Writes the files of a report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import fedpeft
from fedpeft.process import durable
from fedpeft.studies.report.figures import figures_of, png, svg
from fedpeft.studies.report.tables import as_csv, as_latex, tables_of
from fedpeft.studies.results import StudyResult

PAGE = "report.html"


def write_report(study: StudyResult, out: Path) -> list[Path]:
    """Writes report.html, curves.csv, and a file for each figure and table.

    Args:
        study: The results.
        out: A folder; made if it is not there.

    Returns:
        The files.

    Raises:
        StateInvalid: If it cannot be written.
        DiskFull: If there is no room.
    """
    from jinja2 import Environment, StrictUndefined

    with durable.refusals(f"writing {out}"):
        out.mkdir(parents=True, exist_ok=True)
    figures, tables = figures_of(study), tables_of(study)
    drawn = {name: svg(figure) for name, figure in figures.items()}
    template = resources.files("fedpeft.studies.report").joinpath("page.html").read_text(encoding="utf-8")
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = made.from_string(template).render(
        study=study, about=study.about, tables=tables, figures=drawn, facts=_facts(study), version=fedpeft.__version__
    )
    files = {PAGE: page.encode(), "curves.csv": as_csv(study).encode()}
    for name, figure in figures.items():
        files |= {f"{name}.svg": drawn[name].encode(), f"{name}.png": png(figure)}
    files |= {f"{table.name}.tex": as_latex(table).encode() for table in tables}
    with durable.refusals(f"writing {out}"):
        for name, data in files.items():
            durable.write(out / name, data, durable.FOR_ALL)
    return [out / name for name in files]


def _facts(study: StudyResult) -> list[tuple[str, str]]:
    """Returns what decides the bits besides the run files, each with the values that the cells have."""
    found: dict[str, list[str]] = {}
    for cell in study.cells:
        for name, value in (cell.report or {}).get("facts", {}).items():
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return [(name, ", ".join(values)) for name, values in found.items()]
