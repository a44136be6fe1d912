"""Progress of a study on a terminal: a line for each cell that ended, and now and then for those at work."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fedpeft import formatting
from fedpeft.process import output
from fedpeft.studies.cells import Cell
from fedpeft.studies.execution import AtWork, Done, Watcher

EVERY_S = 15.0
"""Without the end of a cell, the cells at work are named so often."""


class Progress(Watcher):
    """Says what happens in a study.

    Args:
        cells: Number of cells.
        jobs: Most cells at once.
    """

    def __init__(self, cells: int, jobs: int) -> None:
        self._cells = cells
        self._jobs = jobs
        self._todo: int | None = None
        self._seconds: list[float] = []
        self._failed = 0
        self._said = time.monotonic()

    @property
    def words(self) -> str:
        """The cells that ended with results, in words."""
        there = self._cells - (self._todo if self._todo is not None else self._cells)
        return f"the results of {formatting.counted(there + len(self._seconds), 'cell')}"

    def planned(self, todo: int) -> None:
        """See `Watcher.planned`."""
        self._todo = todo
        there = self._cells - todo
        before = f", {formatting.counted(there, 'cell')} with results already" if there else ""
        output.note(f"{formatting.counted(self._cells, 'cell')}{before}; {self._jobs} at once")

    def ended(self, done: Done) -> None:
        """See `Watcher.ended`."""
        if done.failure:
            self._failed += 1
            self._note(f"{done.cell.label}: failed: {done.failure}")
        else:
            self._seconds.append(done.seconds)
            self._note(f"{done.cell.label}: {_outcome(done)}, {done.seconds:.0f} s{self._left()}")

    def tick(self, at_work: Sequence[AtWork]) -> None:
        """See `Watcher.tick`."""
        if at_work and time.monotonic() - self._said >= EVERY_S:
            said = "; ".join(
                f"{_short(each.cell)}: round {each.rounds} of {each.cell.config.rounds.count}" for each in at_work
            )
            self._note(said + self._left())

    def _left(self) -> str:
        """Returns a clause about the time that is left, as soon as a cell has ended."""
        left = (self._todo or 0) - len(self._seconds) - self._failed
        if not self._seconds or not left:
            return ""
        mean = sum(self._seconds) / len(self._seconds)
        return f"; {formatting.counted(left, 'cell')} left, about {formatting.duration(mean * left / self._jobs)}"

    def _note(self, line: str) -> None:
        self._said = time.monotonic()
        output.note(line)


def _short(cell: Cell) -> str:
    return ", ".join([*cell.points.values(), f"seed {cell.seed}"])


def _outcome(done: Done) -> str:
    """Returns the last accuracy of a cell, or the number of rounds."""
    from fedpeft.studies.results import load_report

    report = load_report(done.folder)
    metrics = report["rounds"][-1]["metrics"] if report["rounds"] else report["initial_metrics"]
    if "accuracy" in metrics:
        return f"accuracy {formatting.percent(metrics['accuracy'])}"
    return formatting.counted(len(report["rounds"]), "round")
