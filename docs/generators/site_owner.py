"""Keys of a site owner's policy, and every metric of a client."""

from collections.abc import Iterator

from prometheus_client.metrics import MetricWrapperBase

from fedpeft_client.owner.machine import MachineCollector
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.owner.policy import Policy
from fedpeft_client.owner.run_series import PerRun
from generators.run_file import rows
from generators.tables import table

PAGE = "site-owner.md"


def lines() -> Iterator[str]:
    """Yields a table a section of the policy, and one of the metrics."""
    yield from ("## Every key of a policy", "")
    for name, field in Policy.model_fields.items():
        section = field.annotation
        _, _, text = (section.__doc__ or "").partition(": ")
        yield from (f"### `[{name}]`", "", text[:1].upper() + text[1:], "", *rows(section), "")
    yield from ("## Every metric of a client", "")
    yield from table(("metric", "kind", "labels", "what it shows"), _metrics())


def _metrics() -> Iterator[tuple[str, ...]]:
    every = [each.metric if isinstance(each, PerRun) else each for each in vars(Metrics()).values()]
    own = [metric for metric in every if isinstance(metric, MetricWrapperBase)]
    families = [(next(iter(metric.describe())), metric._labelnames) for metric in own]
    families += [(family, family._labelnames) for family in MachineCollector(str).describe()]
    for family, labels in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        yield f"`{name}`", family.type, ", ".join(f"`{each}`" for each in labels), family.documentation
