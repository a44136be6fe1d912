"""Assembly of a study: the file, what is changed of it for once, and its cells, all of them checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedpeft.studies.cells import Cell, Machine, cells_of
from fedpeft.studies.checks import check_cells
from fedpeft.studies.study_file import StudyFile, changed, load_study


@dataclass(frozen=True)
class Changes:
    """Changes of a study for once.

    Attributes:
        scale: Name of one of its scales.
        override: Fields that every cell gets, as tables of a run file.
        seeds: In place of the file's; none: the file's.
        axes: More axes, and their points.
        only: Points of an axis that are wanted; all points of the others are.
    """

    scale: str | None = None
    override: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    seeds: Sequence[int] = ()
    axes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    only: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))


def assembled(
    file: Path, places: Mapping[str, Path], changes: Changes, machine: Machine
) -> tuple[StudyFile, list[Cell]]:
    """Returns a study and its cells; nothing has run, and what would fail at once was refused.

    Args:
        file: The study file, or a run file.
        places: Data sets by name, see `fedpeft.studies.cells.cells_of`. The name "" is the study's only one.
        changes: Changes for once.
        machine: The machine that is to hold the cells.

    Raises:
        ConfigInvalid: If the file, a change or a cell is wrong.
        DataInvalid: If the data of a cell is not there, cannot be divided so, or does not fit the classes.
        ModelInvalid: If there is no such model, or no such file of weights.
        SettingsInvalid: If there is no such device.
    """
    study = load_study(file, changes.scale)
    fresh: dict[str, Any] = {"axes": {**study.axes, **changes.axes}}
    if changes.seeds:
        fresh["seeds"] = tuple(changes.seeds)
    study = changed(study, fresh, file)
    cells = cells_of(study, study.named(places), override=changes.override, only=changes.only)
    check_cells(cells, machine)
    return study, cells
