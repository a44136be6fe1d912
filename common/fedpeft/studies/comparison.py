"""Comparison of runs, simulations and studies: all of them as the results of one study, so that one report serves.

What is compared is a line of its own each: a simulation or a run one, a study one for each combination of its points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpeft import text_files
from fedpeft.errors import DataInvalid
from fedpeft.simulation.progress_log import UNFINISHED
from fedpeft.studies.files import REPORT, STUDY
from fedpeft.studies.results import COMPLETED, CellResult, StudyResult, checked_report, load_report, load_results

AXIS = "run"


def compared(sources: Sequence[tuple[str, Mapping[str, Any] | Path]]) -> StudyResult:
    """Returns what is compared, as the results of a study.

    Args:
        sources: A name of each, and its report, or where it lies: the folder of a simulation or of a study, or a file
            with what `fedpeft run show --json` printed. Equal names get a number.

    Raises:
        DataInvalid: If there is no such thing at a path.
    """
    found: list[CellResult] = []
    for name, source in sources:
        taken = {cell.points[AXIS] for cell in found}
        found += _named(_cells(name, source), taken)
    about: dict[str, Any] = {
        "name": "comparison",
        "title": f"Comparison of {', '.join(name for name, _ in sources)}",
        "question": "",
        "target": None,
        "budgets_bytes": [],
        "axes": {AXIS: list(dict.fromkeys(cell.points[AXIS] for cell in found))},
    }
    return StudyResult(Path(), about, tuple(found))


def _named(cells: Sequence[CellResult], taken: set[str]) -> list[CellResult]:
    """Returns cells under names that are not taken."""
    names: dict[str, str] = {}
    for cell in cells:
        own = cell.points[AXIS]
        if own not in names:
            number, name = 1, own
            while name in taken:
                number += 1
                name = f"{own} ({number})"
            names[own] = name
    return [replace(cell, points={AXIS: names[cell.points[AXIS]]}) for cell in cells]


def _cells(name: str, source: Mapping[str, Any] | Path) -> list[CellResult]:
    if isinstance(source, Mapping):
        return [_cell(name, source)]
    if (source / STUDY).exists():
        several = load_results(source)
        return [replace(cell, points={AXIS: ", ".join([name, *cell.points.values()])}) for cell in several.cells]
    if (source / REPORT).exists():
        return [_cell(name, load_report(source))]
    if source.is_file():
        return [_cell(name, _shown(source))]
    if (source / UNFINISHED).is_dir():
        raise DataInvalid(f"{source} holds a simulation that has not ended; the command that began it goes on with it")
    raise DataInvalid(f"{source} is neither the folder of a simulation or study, nor a file of fedpeft run show --json")


def _cell(name: str, report: Mapping[str, Any]) -> CellResult:
    seed = int(report.get("config", {}).get("rounds", {}).get("seed", 0))
    state = report.get("state", COMPLETED)
    shown = name if state == COMPLETED else f"{name} ({state})"
    return CellResult("", {AXIS: shown}, seed, shown, report, "")


def _shown(file: Path) -> Mapping[str, Any]:
    try:
        report = text_files.json_of(text_files.read(file, text_files.MOST_LISTED_BYTES))
    except OSError as error:
        raise DataInvalid(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise DataInvalid(f"{file} is not JSON: {error}") from None
    if not isinstance(report, dict) or not {"rounds", "method", "initial_metrics"} <= report.keys():
        raise DataInvalid(f"{file} is not what fedpeft run show --json prints")
    return checked_report(report, file)
