"""trackio: a run of a project in its own SQLite files (`TRACKIO_DIR`). The run file is its config."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from fedpeft.tracking.figures import TrackedRun
from fedpeft.tracking.tracker import Point, Tracker, trackers

PROJECT = "fedpeft"
"""Name of the project where the target says none."""


@trackers.register("trackio")
class Trackio(Tracker):
    """Metrics by round; the target is a project."""

    module = extra = "trackio"

    def begin(self, run: TrackedRun) -> set[Point]:
        """See `Tracker.begin`."""
        import trackio
        import trackio.run
        import trackio.utils

        for module in (trackio, trackio.run, trackio.utils):  # it prints; standard output is the command's own
            vars(module)["print"] = partial(print, file=sys.stderr)
        self._run = trackio.init(
            project=self.target or PROJECT,
            name=run.label,
            config={**run.facts, **run.settings},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        logs = trackio.SQLiteStorage.get_logs(self._run.project, run.label, run_id=self._run.id)
        return {(each["step"], name) for each in logs for name in each}

    def round(self, number: int, figures: Mapping[str, float], at: float) -> None:
        """See `Tracker.round`."""
        committed_at = datetime.fromtimestamp(at, UTC).isoformat()
        self._run.log({**figures, "committed_at": committed_at}, step=number)

    def end(self, state: str) -> None:
        """See `Tracker.end`."""
        self._run.finish()
