"""The metrics of the daemon: name, kind, labels, what they show, in the order of their declaration."""

from collections.abc import Iterator

from prometheus_client.metrics import MetricWrapperBase

from fedpeft_server.metrics import Metrics
from generators.tables import table

PAGE = "metrics.md"


def lines() -> Iterator[str]:
    """Yields a table of the metrics."""
    yield from ("## Metrics", "")
    yield from table(("metric", "kind", "labels", "what it shows"), _rows())
    yield from ("", "`process_*` are prometheus-client's: memory, processor time, open files, start of the process.")


def _rows() -> Iterator[tuple[str, ...]]:
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            yield f"`{name}`", family.type, labels, family.documentation
