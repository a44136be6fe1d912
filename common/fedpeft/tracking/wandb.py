"""Weights & Biases: a run of a project. The run file is its config.

Notable: settings of the service are the library's own, as `WANDB_MODE=offline`. The library cannot read back a run that
it wrote offline, so the points that were handed over stand in a file beside its folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from fedpeft.tracking.figures import TrackedRun
from fedpeft.tracking.tracker import Point, Tracker, trackers

PROJECT = "fedpeft"
"""Name of the project where neither the target nor `WANDB_PROJECT` says one."""
LONGEST_ID = 120
"""Characters of a run's id; the service takes 128."""


@trackers.register("wandb")
class WeightsAndBiases(Tracker):
    """Metrics over the figure `round`; the target is a project."""

    module = extra = "wandb"

    def begin(self, run: TrackedRun) -> set[Point]:
        """See `Tracker.begin`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read as it is imported
        import wandb

        self._handed_over = self.folder / "wandb" / f"{run.label}.points"
        self._handed_over.parent.mkdir(parents=True, exist_ok=True)
        written = _points(self._handed_over.read_text(encoding="utf-8")) if self._handed_over.exists() else set()
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
        self._run.log({"round": number, "committed_at": at, **figures})
        with self._handed_over.open("a", encoding="utf-8") as points:
            points.write(json.dumps([number, sorted(figures)]) + "\n")

    def end(self, state: str) -> None:
        """See `Tracker.end`."""
        self._run.summary["state"] = state
        self._run.finish(exit_code=0 if state in ("completed", "running") else 1)


def _points(text: str) -> set[Point]:
    lines = [json.loads(line) for line in text.splitlines()]
    return {(number, name) for number, names in lines for name in names}
