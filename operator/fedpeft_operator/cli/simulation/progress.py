"""Progress of a simulation on a terminal: a line for each round, and now and then for a long one."""

from __future__ import annotations

import time

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.process import output

EVERY_S = 10.0
"""A round that takes longer says so often how far it is."""


class Progress:
    """Says every round that is committed, and how far a long one is."""

    def __init__(self, count: int, *, resumable: bool, quiet: bool) -> None:
        self._count = count
        self.resumable = resumable
        self._quiet = quiet
        self._last = 0
        self._said = time.monotonic()

    @property
    def rounds(self) -> str:
        """Number of committed rounds, in words."""
        return f"{self._last} of {formatting.counted(self._count, 'round')}"

    def resumed(self, rounds: int) -> None:
        """Takes the number of rounds that an earlier process committed."""
        self._last = rounds

    def committed(self, row: views.Json) -> None:
        """Takes a committed round, as the report has it."""
        self._last = int(row["version"])
        self._note(_line(row, self._count))

    def worked(self, number: int, had: int, sampled: int) -> None:
        """Takes a client's turn in a round, in which so many of those who were sampled had theirs."""
        if time.monotonic() - self._said >= EVERY_S:
            self._note(
                f"round {number} of {self._count}: {had} of {formatting.counted(sampled, 'client')} had their turn"
            )

    def _note(self, line: str) -> None:
        self._said = time.monotonic()
        if not self._quiet:
            output.note(line)


def _line(row: views.Json, count: int) -> str:
    """Returns what is said of a round as soon as it is committed."""
    metrics = row["metrics"]
    said = [f"round {row['version']} of {count}", formatting.counted(len(row["clients"]), "update")]
    if "accuracy" in metrics:
        said.append(f"accuracy {formatting.percent(metrics['accuracy'])}")
    if "train_loss" in metrics:
        said.append(f"training loss {metrics['train_loss']:.3f}")
    return ", ".join([*said, f"{row['seconds']:.1f} s"])
