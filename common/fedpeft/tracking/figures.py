"""Facts, settings and figures of a run for trackers, from the rows of its report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Json = Mapping[str, Any]

FACTS = ("run", "method", "adapter_parameters", "model_parameters", "backbone_fingerprint", "created_at")
"""Keys of a report that say what a run is."""
SUMS = (
    "payload_bytes_up",
    "payload_bytes_down",
    "wire_bytes_up",
    "wire_bytes_down",
    "full_bytes_each_way",
    "seconds",
    "extensions",
)
"""Keys of a round that are figures; those that are None are left out."""


LONGEST_LABEL = 200
"""Bytes of a run's label: file systems take names of 255, and trackers add an ending."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        id: A name that no other run has.
        name: The name in the run file.
        facts: Method, numbers of parameters, fingerprint, time of creation, by the report's keys.
        settings: The run file by dotted path, as text.
        created_at: Seconds since the epoch.
    """

    id: str
    name: str
    facts: Mapping[str, str]
    settings: Mapping[str, str]
    created_at: float

    @property
    def label(self) -> str:
        """Name and id, of letters, digits, dots, hyphens and underscores: a name for people, a folder's too.

        Of a long one the end, which has the id; what a file system takes is counted in bytes.
        """
        whole = re.sub(r"[^\w.-]+", "_", f"{self.name}-{self.id}")
        return whole.encode()[-LONGEST_LABEL:].decode(errors="ignore")


def tracked_run(report: Json, *, simulated: bool) -> TrackedRun:
    """Returns the run of a report, which may still be without rounds.

    Args:
        report: The report.
        simulated: True if the run's id is that of other simulations too, so that its time belongs to it.
    """
    created = report["created_at"] or ""
    started = "-" + re.sub(r"[^\dTZ]", "", created) if simulated else ""
    return TrackedRun(
        id=report["run"] + started,
        name=report["name"],
        facts={key: str(report[key]) for key in FACTS if report.get(key) is not None},
        settings=dict(_flat(report["config"])),
        created_at=seconds_of(created),
    )


def figures_of(row: Json) -> dict[str, float]:
    """Returns the figures of a committed round by name: its metrics, its bytes, its time, how many clients counted."""
    sums = {key: float(row[key]) for key in SUMS if row.get(key) is not None}
    return {**row["metrics"], **sums, "clients": float(len(row["clients"]))}


def seconds_of(moment: str) -> float:
    """Returns a time in ISO 8601 as seconds since the epoch; 0 if it is not known."""
    return datetime.fromisoformat(moment).timestamp() if moment else 0.0


def _flat(config: Json, before: str = "") -> Iterator[tuple[str, str]]:
    """Yields every setting by its dotted path."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
