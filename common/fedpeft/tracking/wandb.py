"""Weights & Biases: a run of a project. The run file is its config.

Notable: settings of the service are the library's own, as `WANDB_MODE=offline`. The library cannot read back a run that
it wrote offline, so the points that were handed over stand in a file beside its folders. A line stands there before its
points are handed over, and is taken back if that fails: a kill at any time leaves no point that is handed over twice.
What the library had not written by then is lost, which is said when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

from fedpeft.tracking.figures import TrackedRun
from fedpeft.tracking.tracker import Point, Tracker, trackers

PROJECT = "fedpeft"
"""Name of the project where neither the target nor `WANDB_PROJECT` says one."""
LONGEST_ID = 120
"""Characters of a run's id; the service takes 128."""

_log = structlog.get_logger(__name__)


@trackers.register("wandb")
class WeightsAndBiases(Tracker):
    """Metrics over the figure `round`; the target is a project."""

    module = extra = "wandb"

    def begin(self, run: TrackedRun) -> set[Point]:
        """See `Tracker.begin`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read as it is imported
        import wandb

        self._handed_over = _HandedOver(self.folder / "wandb" / f"{run.label}.points")
        written = self._handed_over.points()
        if written and not self._handed_over.is_ended:
            _log.warning(
                "a process of this run was killed: points that W&B had not written by then are lost; to hand all of "
                "them over again, remove the file, and the folders of the run beside it",
                file=str(self._handed_over.file),
            )
        self._run = wandb.init(
            project=self.target or os.environ.get("WANDB_PROJECT") or PROJECT,
            id=run.label[-LONGEST_ID:],
            name=run.name,
            config={**run.facts, **run.settings},
            resume="allow",
            dir=str(self.folder),
            # Output, host and repository are no part of a run's rounds: nothing else leaves this machine.
            settings=wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("*", step_metric="round")
        return written

    def round(self, number: int, figures: Mapping[str, float], at: float) -> None:
        """See `Tracker.round`."""
        with self._handed_over.noted(number, figures):
            self._run.log({"round": number, "committed_at": at, **figures})

    def end(self, state: str) -> None:
        """See `Tracker.end`."""
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("completed", "running") else 1)
        self._handed_over.end()


class _HandedOver:
    """The points that were handed over to the library: a file with a line of JSON for each time, [round, names].

    Attributes:
        file: The file.
        is_ended: True if the library was given time to write them: the last line is [].
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.is_ended = False
        file.parent.mkdir(parents=True, exist_ok=True)

    def points(self) -> set[Point]:
        """Returns them; cuts off a last line that was not finished, whose points were not handed over."""
        data = self.file.read_bytes() if self.file.exists() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.file, whole)
        lines = [json.loads(line) for line in data[:whole].splitlines()]
        self.is_ended = lines[-1:] == [[]]
        return {(number, name) for number, names in filter(None, lines) for name in names}

    def end(self) -> None:
        """Notes that the library has written the points."""
        with self.file.open("ab") as file:
            file.write(b"[]\n")

    @contextmanager
    def noted(self, number: int, names: Iterable[str]) -> Iterator[None]:
        """Notes points that the block hands over; if it fails, or cannot be noted, the file is as it was."""
        with self.file.open("ab") as file:
            before = file.tell()
            try:
                file.write(json.dumps([number, sorted(names)]).encode() + b"\n")
                file.flush()
                yield
            except BaseException:
                os.truncate(self.file, before)
                raise
