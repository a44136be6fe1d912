"""MLflow: a run of an experiment, in any store of its own. The run file is its parameters.

Notable: the library reports its use to its makers unless it is told otherwise; here it is, unless the environment says
so (`MLFLOW_DISABLE_TELEMETRY=false`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fedpeft.process import locks
from fedpeft.tracking.figures import TrackedRun
from fedpeft.tracking.tracker import Point, Tracker, trackers

EXPERIMENT = "fedpeft"
"""Name of the experiment where `MLFLOW_EXPERIMENT_NAME` says none."""
TAG = "fedpeft.run"
"""The tag with our id, by which a run is found again."""
AT_ONCE = 100
"""Metrics, parameters or tags in a request: as many as every MLflow server takes."""
LONGEST_VALUE = 500
"""Characters of a parameter that every MLflow server takes."""
FILE = "sqlite:///"
"""The beginning of a URI that names a file."""
STATUS = {"completed": "FINISHED", "running": "RUNNING", "failed": "FAILED", "paused": "FAILED"}
"""MLflow's words; it is KILLED in any other state."""


@trackers.register("mlflow")
class MLflow(Tracker):
    """Metrics by round; the target is a tracking URI, else `MLFLOW_TRACKING_URI`, else a SQLite file in the folder."""

    module = extra = "mlflow"

    def key(self, name: str) -> str:
        """See `Tracker.key`."""
        return re.sub(r"[^\w.\- /]", "_", name)

    def begin(self, run: TrackedRun) -> set[Point]:
        """See `Tracker.begin`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read as it is imported
        from mlflow import MlflowClient

        store = self.target or os.environ.get("MLFLOW_TRACKING_URI") or f"{FILE}{self.folder.absolute() / 'mlflow.db'}"
        with _making(store):
            self._client = MlflowClient(store)
            experiment = self._experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT))
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'", max_results=1)
        if found:
            self._run: str = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            tags = {TAG: run.id, **{f"fedpeft.{key}": value for key, value in run.facts.items() if key != "run"}}
            created = self._client.create_run(experiment, int(run.created_at * 1000), tags, run.name)
            self._run = created.info.run_id
        self._log_settings(run.settings)
        return self._points(found[0].data.metrics if found else {})

    def round(self, number: int, figures: Mapping[str, float], at: float) -> None:
        """See `Tracker.round`."""
        from mlflow.entities import Metric

        self._log(metrics=[Metric(self.key(name), value, int(at * 1000), number) for name, value in figures.items()])

    def end(self, state: str) -> None:
        """See `Tracker.end`."""
        if state != "running":
            self._client.set_terminated(self._run, STATUS.get(state, "KILLED"))

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))

    def _log_settings(self, settings: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self._log(params=[Param(self.key(name), value[:LONGEST_VALUE]) for name, value in settings.items()])

    def _log(self, **kinds: Sequence[Any]) -> None:
        for kind, items in kinds.items():
            for start in range(0, len(items), AT_ONCE):
                self._client.log_batch(self._run, **{kind: items[start : start + AT_ONCE]})

    def _points(self, names: Mapping[str, float]) -> set[Point]:
        histories = {name: self._client.get_metric_history(self._run, name) for name in names}
        return {(point.step, name) for name, history in histories.items() for point in history}


@contextmanager
def _making(store: str) -> Iterator[None]:
    """Makes the tables of a file that is not there, whole or not at all, and lets one process do so at a time.

    Two at once, as cells of a study, break each other's, and of half of them the library cannot make the other half.
    """
    file = Path(store.removeprefix(FILE))
    with locks.in_turn(file.parent) if store.startswith(FILE) and file.parent.is_dir() else nullcontext():
        if store.startswith(FILE) and file.parent.is_dir() and not file.exists():
            from mlflow import MlflowClient

            begun = file.with_name(f"{file.name}.begun")
            begun.unlink(missing_ok=True)
            MlflowClient(f"{FILE}{begun}").search_experiments()
            begun.rename(file)
        yield
