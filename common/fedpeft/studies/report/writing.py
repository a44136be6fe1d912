"""Writes the files of a report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import fedpeft
from fedpeft.process import durable
from fedpeft.studies.report.figures import figures_of, png, svg
from fedpeft.studies.report.selection import MOST_ROWS, for_page
from fedpeft.studies.report.tables import as_csv, as_latex, cells_csv, curves_csv, tables_of
from fedpeft.studies.results import StudyResult

PAGE = "report.html"


def write_report(study: StudyResult, out: Path) -> list[Path]:
    """Writes report.html, curves.csv, cells.csv, and files of each figure and table.

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
    vectors = {name: svg(drawn.figure) for name, drawn in figures.items()}
    template = resources.files("fedpeft.studies.report").joinpath("page.html").read_text(encoding="utf-8")
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = made.from_string(template).render(
        about=study.about,
        cells=study.cells,
        overlap=study.overlap,
        failed=[cell for cell in study.cells if not cell.report],
        most=MOST_ROWS,
        tables=tables,
        shown=for_page(study),
        figures={name: (drawn, vectors[name]) for name, drawn in figures.items()},
        facts=_facts(study),
        version=fedpeft.__version__,
    )
    files = {PAGE: page.encode(), "curves.csv": curves_csv(study).encode(), "cells.csv": cells_csv(study).encode()}
    for name, drawn in figures.items():
        files |= {f"{name}.svg": vectors[name].encode(), f"{name}.png": png(drawn.figure)}
    for table in tables:
        files |= {f"{table.name}.tex": as_latex(table).encode(), f"{table.name}.csv": as_csv(table).encode()}
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
