"""Experiment trackers of a study: each cell is one run there, named by study and cell.

Notable: a cell has the id of its content, so one that goes on, is repeated or stands in two studies is the same run,
and no point of it is written twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedpeft.process import durable
from fedpeft.studies.cells import Cell
from fedpeft.studies.files import TRACKED
from fedpeft.studies.results import load_report
from fedpeft.tracking import Tracking, shown, tracker_named, tracking_to

CELL_UNANSWERED_S = 5.0
"""Longest wait at a cell's end for a tracker that never answered: it is asked again when all cells have ended."""


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

    @contextmanager
    def of(
        self, cell: Cell, folder: Path, without: Container[str] = (), unanswered_s: float | None = CELL_UNANSWERED_S
    ) -> Iterator[Tracking]:
        """Yields the tracking of a cell; its folder keeps which trackers have all that the block gave them.

        Args:
            cell: The cell.
            folder: Of its results; its name is the run's id.
            without: Trackers that are not asked, as `shown` has them.
            unanswered_s: Longest wait for one that never answered, as of `Tracking`.
        """
        names = [name for name in self.names if shown(name) not in without]
        label = f"{self.study}: {cell.label}"
        with tracking_to(names, self.folder, name=label, run=folder.name, unanswered_s=unanswered_s) as tracking:
            yield tracking
        if len(names) == len(self.names) > 0 and not tracking.missed:
            known = dict.fromkeys([*_known(folder), *map(shown, self.names)])
            durable.write_text(folder / TRACKED, json.dumps([*known]) + "\n")

    def write(self, cells: Iterable[tuple[Cell, Path]]) -> dict[str, int]:
        """Writes the cells that some tracker does not have: those from before, and what one of them did not take.

        A tracker that does not answer is asked for no further cell: each would wait as long.

        Args:
            cells: Those with results, each with its folder.

        Returns:
            Number of rounds that were not written, by tracker; 0 for one that did not answer their end alone.
        """
        missed: Counter[str] = Counter()
        silent: set[str] = set()
        for cell, folder in cells:
            if set(map(shown, self.names)) <= set(_known(folder)):
                continue
            report = load_report(folder)
            for tracker in silent:
                missed[tracker] += len(report["rounds"]) + bool(report["initial_metrics"])
            if silent == set(map(shown, self.names)):
                continue
            with self.of(cell, folder, silent, None) as tracking:
                tracking.begin(report)
                for row in report["rounds"]:
                    tracking.round(row)
                tracking.end(report["state"])
            missed.update(tracking.missed)
            silent |= tracking.silent
        return dict(missed)


def _known(folder: Path) -> list[str]:
    """Returns the trackers that have all rounds of a cell; none where nothing, or nothing readable, says so."""
    try:
        found: list[str] = json.loads((folder / TRACKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found
