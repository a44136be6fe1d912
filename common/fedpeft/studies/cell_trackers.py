"""Experiment trackers of a study: each cell is one run there, named by study and cell.

Notable: a cell has the id of its content, so one that goes on, is repeated or stands in two studies is the same run,
and no point of it is written twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fedpeft.studies.cells import Cell
from fedpeft.studies.results import load_report
from fedpeft.tracking import Tracking, tracker_named, tracking_to


@dataclass(frozen=True)
class CellTrackers:
    """The trackers of a study, picklable.

    Attributes:
        study: Name of the study.
        names: Of the trackers, as `--track` has them.
        folder: Place for files where a name has no target.

    Raises:
        ConfigInvalid: If there is no such tracker.
        LocalError: If the library of one is not installed.
    """

    study: str
    names: tuple[str, ...]
    folder: Path

    def __post_init__(self) -> None:
        for name in self.names:
            tracker_named(name, self.folder)

    def of(self, cell: Cell, key: str) -> Tracking:
        """Returns the tracking of a cell.

        Args:
            cell: The cell.
            key: The name of its folder.
        """
        return tracking_to(self.names, self.folder, name=f"{self.study}: {cell.label}", run=key)

    def write(self, cells: Iterable[tuple[Cell, Path]]) -> dict[str, int]:
        """Writes cells that have results, and that no process of theirs has written.

        Args:
            cells: Each with the folder of its results.

        Returns:
            Number of rounds that were not written, by tracker.
        """
        missed: dict[str, int] = {}
        for cell, folder in cells:
            report = load_report(folder)
            with self.of(cell, folder.name) as tracking:
                tracking.begin(report)
                for row in report["rounds"]:
                    tracking.round(row)
                tracking.end(report["state"])
            for tracker, rounds in tracking.missed.items():
                missed[tracker] = missed.get(tracker, 0) + rounds
        return missed
