"""Prometheus series by run, of the runs that were used last: a server may name as many runs as it likes."""

from __future__ import annotations

from typing import Generic, TypeVar, cast

from prometheus_client import Counter, Gauge

from fedpeft_client.state.bounded import BoundedDict

MOST = 256
"""Runs with series; of more, those of the run that was used longest ago are dropped."""

Metric = TypeVar("Metric", bound=Counter | Gauge)


class RunSeries:
    """The runs that have series, and the metrics that those are of."""

    def __init__(self) -> None:
        self._runs: BoundedDict[str, None] = BoundedDict(MOST)
        self._metrics: list[Counter | Gauge] = []

    @property
    def runs(self) -> list[str]:
        """The runs that have series, the one used longest ago first."""
        return list(self._runs)

    def of(self, metric: Metric) -> PerRun[Metric]:
        """Returns a metric whose first label is the run, with its series bounded."""
        self._metrics.append(metric)
        return PerRun(metric, self)

    def use(self, run: str) -> None:
        """Notes that a run is used; drops the series of another one if there are too many."""
        gone = self._runs.put(run, None)
        if gone is not None:
            self.drop(gone)

    def drop(self, run: str) -> None:
        """Drops the series of a run."""
        self._runs.pop(run, None)
        for metric in self._metrics:
            metric.remove_by_labels({"run": run})


class PerRun(Generic[Metric]):
    """A metric with series by run.

    Attributes:
        metric: The metric itself.

    Args:
        metric: The metric; its first label is `run`.
        series: The runs that have series.
    """

    def __init__(self, metric: Metric, series: RunSeries) -> None:
        self.metric = metric
        self._series = series

    def labels(self, run: str, *others: str) -> Metric:
        """Returns the series of a run, and of the values of the other labels."""
        self._series.use(run)
        return cast(Metric, self.metric.labels(run, *others))
