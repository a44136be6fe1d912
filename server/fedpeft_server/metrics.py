"""Every Prometheus metric of the daemon. No label carries a round number or a client id.

A run's series begin with the run (what is counted begins at 0, so that the first event is seen as a change) and
disappear when it is deleted; of one that is over, a restart brings the gauges back and nothing that counts.
`docs/metrics.md` is made from this module; `fedpeft_server.runs.gauges` says what the gauges of a run show.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.registry import Collector

from fedpeft.errors import SettingsInvalid
from fedpeft.privacy.statement import EPSILON
from fedpeft.process import metrics_port
from fedpeft.process.metrics_port import MetricsServer
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import Refusal
from fedpeft_server.store.blobs.integrity import Corruption, Kind

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_STALENESS = (0, 1, 2, 3, 5, 10, 20, 50, 100)
_NORMS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1e3, 1e4)
_RATES = (0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_MEMORY = tuple(float(gib * 2**30) for gib in (0.25, 0.5, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 144, 192))

_BEGINNINGS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "wire_bytes": (("up",), ("down",)),
    "round_bytes": (("up",), ("down",)),
    "last_round_bytes": (("up",), ("down",)),
    "rounds": (("committed",), ("rolled_back",), ("extended",), ("paused",), ("stopped",)),
    "round_seconds": (("open",), ("aggregating",)),
    "updates": (("received",), ("refused",), ("late",), ("excluded",), ("lost",)),
    "update_norm": ((),),
    "update_staleness": ((),),
    "evaluation_backlog": ((),),
    "evaluations_failed": ((),),
    "awaited_clients": (("training",), ("uploading",), ("slow",), ("stalled",), ("silent",)),
    "client_images_per_second": ((),),
    "client_gpu_memory_bytes": ((),),
}
"""The series that a run begins with: what follows the run in their labels, by metric."""

BACKGROUND = (
    "matching",
    "deadline",
    "progress",
    "fold",
    "notices",
    "seats",
    "clock",
    "revisions",
    "setup",
    "traffic",
    "files",
    "database",
    "certificate",
    "certificate files",
    "clients",
    "log",
    "tokens",
    "storage",
    "retention",
    "health",
    "enrolment",
    "event loop",
)
"""The work that no call waits for."""

_ROLES = ("trainer", "evaluator")
_SILENCES = ("present", "silent", "gone")

_OF_CLIENTS = ("images_per_second", "gpu_memory_bytes")
"""Figures of an update that have a histogram of their own."""


class _Room(NamedTuple):
    total: float
    free: float


class _OfRuns(CollectorRegistry):
    """Registers the metrics whose series are of runs, and has those of a run removed.

    Args:
        registry: That of all metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__()
        self._registry = registry
        self._metrics: list[Counter | Gauge | Histogram] = []

    def register(self, collector: Collector) -> None:
        """Takes a metric with the label `run`."""
        assert isinstance(collector, Counter | Gauge | Histogram)
        self._registry.register(collector)
        self._metrics.append(collector)

    def forget(self, run: str) -> None:
        """Removes all series of a run."""
        for metric in self._metrics:
            metric.remove_by_labels({"run": run})


class Metrics:
    """The metrics of one daemon, in a registry of their own. `run` is the run's id, empty for none."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._of_runs = _OfRuns(self.registry)
        self._declare_daemon()
        self._declare_storage()
        self._declare_bytes()
        self._declare_rounds()
        self._declare_evaluations()
        self._declare_clients()

    def _declare_daemon(self) -> None:
        r = self.registry
        self.build = Gauge("fedpeft_build", "Always 1; the label is the server's version.", ("version",), registry=r)
        self.certificate_expiry_seconds = Gauge(
            "fedpeft_certificate_expiry_seconds",
            "Expiry time of the server's certificates (`server`, `authority`), Unix time in seconds.",
            ("certificate",),
            registry=r,
        )
        self.background_failures = Counter(
            "fedpeft_background_failures",
            "Failures of background tasks: `matching` (opens rounds), `deadline`, `progress` (finds hung clients), "
            "`fold`, `traffic` (writes byte counts), `files` (removes files), `certificate`, `log`, `tokens`, "
            "`storage`...",
            ("work",),
            registry=r,
        )
        for work in BACKGROUND:  # from 0, so that the first failure is seen as a change
            self.background_failures.labels(work)
        self.requests = Counter(
            "fedpeft_grpc_requests", "Finished calls, by method and gRPC status code.", ("method", "code"), registry=r
        )
        self.request_seconds = Histogram(
            "fedpeft_grpc_request_seconds", "Duration of calls, seconds.", ("method",), buckets=_SECONDS, registry=r
        )

        self.enrolment_ends = Counter(
            "fedpeft_enrolment_ends", "Restarts of the enrolment process after it ended unexpectedly.", registry=r
        )
        self.enrolment_refused = Counter(
            "fedpeft_enrolment_refused",
            "Connections to the enrolment port that were refused or cut off, by reason: "
            f"{', '.join(f'`{why}`' for why in Refusal)}.",
            ("why",),
            registry=r,
        )
        for why in Refusal:
            self.enrolment_refused.labels(why)
        self.lines_left_out = Counter(
            "fedpeft_log_lines_left_out",
            "Log lines about calls that were suppressed because one caller caused too many.",
            registry=r,
        )

    def _declare_storage(self) -> None:
        r, place = self.registry, ("place",)
        self.disk_free_bytes = Gauge(
            "fedpeft_disk_free_bytes",
            "Free space on the file system of the folder of a place, bytes: `data`, the data folder; `blobs` and "
            "`updates` where --blobs and --updates name folders on other disks.",
            place,
            registry=r,
        )
        self.disk_size_bytes = Gauge("fedpeft_disk_size_bytes", "Size of that file system, bytes.", place, registry=r)
        self.disk_spared_bytes = Gauge(
            "fedpeft_disk_spared_bytes",
            "Free space on it below which uploads, new runs and versions encoded for clients are refused "
            "(--min-free-bytes).",
            place,
            registry=r,
        )
        self.stored_bytes = Gauge(
            "fedpeft_stored_bytes",
            "Size of the files in the data folder and in those of --blobs and --updates, bytes: `blobs` (adapter "
            "versions), `updates`, `spool` (updates being received, waiting for aggregation, or kept by "
            "--keep-updates), `outbound` (encoded versions), `cache` and `fetched` (copies of objects in a bucket), "
            "`scratch` (aggregation in progress), `database` (SQLite). Measured once a minute.",
            place,
            registry=r,
        )
        self.corrupt_files = Counter(
            "fedpeft_corrupt_files",
            "Stored files that were missing or did not have their digest when they were read, by kind: `version`, "
            "`state`, `update`, `download` (a version encoded for clients), `copy` (of an object in a bucket).",
            ("kind",),
            registry=r,
        )
        for kind in Kind:
            self.corrupt_files.labels(kind)

    def _declare_bytes(self) -> None:
        r, run, direction = self._of_runs, ("run",), ("run", "direction")
        self.wire_bytes = Counter(
            "fedpeft_wire_bytes",
            "Size of serialized messages, bytes; `up` is client to server, `down` server to client.",
            direction,
            registry=r,
        )
        self.payload_bytes = Counter(
            "fedpeft_payload_bytes", "Size of encoded tensors, bytes.", (*direction, "encoding"), registry=r
        )
        self.round_bytes = Gauge("fedpeft_round_bytes", "Wire bytes of the round in progress.", direction, registry=r)
        self.last_round_bytes = Gauge(
            "fedpeft_last_round_bytes", "Wire bytes of the last committed round.", direction, registry=r
        )
        self.round_budget_bytes = Gauge(
            "fedpeft_round_budget_bytes",
            "Expected size of the round in progress, bytes: 4 bytes per parameter sent, for each sampled client; "
            "downwards to clients that hold the version before.",
            direction,
            registry=r,
        )
        self.full_finetuning_bytes = Gauge(
            "fedpeft_full_finetuning_bytes",
            "Size of a round of full fine-tuning in each direction, bytes: 4 bytes per model parameter, for each "
            "sampled client; absent if the run was created without a parameter count.",
            run,
            registry=r,
        )

    def _declare_rounds(self) -> None:
        r, run = self._of_runs, ("run",)
        self.run_info = Gauge(
            "fedpeft_run_info", "Always 1; the labels describe the run.", ("run", "name", "method", "model"), registry=r
        )
        self.run_state = Gauge(
            "fedpeft_run_state",
            "1 for the state a run is in, 0 for the others: `running`, `paused`, `completed`, `stopped`.",
            ("run", "state"),
            registry=r,
        )
        self.round = Gauge("fedpeft_round", "Number of the round in progress.", run, registry=r)
        self.round_phase = Gauge(
            "fedpeft_round_phase",
            "1 for the phase the round in progress is in: `waiting`, `open`, `aggregating`, `committed`.",
            ("run", "phase"),
            registry=r,
        )
        self.round_opened = Gauge(
            "fedpeft_round_opened_timestamp_seconds",
            "Opening time of the round in progress, Unix time in seconds; absent unless it is open or aggregating.",
            run,
            registry=r,
        )
        self.round_deadline = Gauge(
            "fedpeft_round_deadline_timestamp_seconds",
            "Deadline of the round in progress, Unix time in seconds; absent if no round is open.",
            run,
            registry=r,
        )
        self.round_extensions = Gauge(
            "fedpeft_round_extensions",
            "Deadlines that the round in progress has missed without a quorum.",
            run,
            registry=r,
        )
        self.round_goal = Gauge(
            "fedpeft_round_goal", "Number of updates at which a round closes before its deadline.", run, registry=r
        )
        self.round_quorum = Gauge(
            "fedpeft_round_quorum", "Fewest updates with which a round closes at its deadline.", run, registry=r
        )
        self.round_available = Gauge(
            "fedpeft_round_available", "Number of waiting clients at which a round opens.", run, registry=r
        )
        self.rounds = Counter(
            "fedpeft_rounds",
            "Rounds by outcome: `committed`, `rolled_back`, `stopped`; also the times that a round was `extended` or "
            "`paused` its run.",
            ("run", "outcome"),
            registry=r,
        )
        self.round_seconds = Histogram(
            "fedpeft_round_seconds",
            "Duration of a round's phases `open` and `aggregating`, seconds.",
            ("run", "phase"),
            buckets=_SECONDS,
            registry=r,
        )

    def _declare_evaluations(self) -> None:
        r, run = self._of_runs, ("run",)
        self.evaluation_backlog = Gauge(
            "fedpeft_evaluation_backlog",
            "Versions still to be scored by the evaluator that is furthest behind.",
            run,
            registry=r,
        )
        self.evaluations_failed = Counter(
            "fedpeft_evaluations_failed", "Versions that an evaluator failed to score.", run, registry=r
        )
        self.accuracy = Gauge(
            "fedpeft_accuracy", "Accuracy of the most recently scored version, 0 to 1.", ("run", "split"), registry=r
        )
        self.loss = Gauge(
            "fedpeft_loss",
            "Mean loss of the newest version, nats; split `train` is the training loss that clients reported.",
            ("run", "split"),
            registry=r,
        )

        self.privacy_epsilon = Gauge(
            "fedpeft_privacy_epsilon",
            "Epsilon that the committed rounds of the run have spent, at its `privacy.delta`; absent without noise.",
            run,
            registry=r,
        )

    def _declare_clients(self) -> None:
        r, run = self._of_runs, ("run",)
        self.updates = Counter(
            "fedpeft_updates",
            "Updates by outcome: `received`, `refused`, `late`; `excluded`: received, but not aggregated; "
            "`lost`: received, missing or corrupt when it was to be aggregated, and asked for again.",
            ("run", "outcome"),
            registry=r,
        )
        self.update_norm = Histogram(
            "fedpeft_update_norm", "Euclidean norm of a decoded update.", run, buckets=_NORMS, registry=r
        )
        self.update_staleness = Histogram(
            "fedpeft_update_staleness",
            "Versions made between the one that an update started from and its round's; 0 in synchronous rounds.",
            run,
            buckets=_STALENESS,
            registry=r,
        )
        self.clients = Gauge(
            "fedpeft_clients",
            "Clients of a run by state: `waiting` to be sampled, `declined`, `set_aside`; and those sampled for the "
            "round in progress by the state of their ticket: `issued` (update still awaited), `received`, `withdrawn`, "
            "`refused`, `late`.",
            ("run", "state"),
            registry=r,
        )
        self.awaited_clients = Gauge(
            "fedpeft_awaited_clients",
            "Clients that the open round awaits, by how far they are: `training`, `uploading`, `slow` (over twice as "
            "long as usual), `stalled` (they call, and their step has not moved for 45 seconds and two of their "
            "steps), `silent` (not heard of for 45 seconds).",
            ("run", "state"),
            registry=r,
        )
        self.registered_clients = Gauge(
            "fedpeft_registered_clients",
            "Registered clients by role (`trainer`, `evaluator`) and time since their last call: `present`, `silent` "
            "(more than 2 minutes), `gone` (more than a day).",
            ("role", "state"),
            registry=self.registry,
        )
        self.client_images_per_second = Histogram(
            "fedpeft_client_images_per_second",
            "Training speed reported with an update, images per second.",
            run,
            buckets=_RATES,
            registry=r,
        )
        self.client_gpu_memory_bytes = Histogram(
            "fedpeft_client_gpu_memory_bytes",
            "Peak GPU memory of local training reported with an update, bytes; only from clients with a GPU.",
            run,
            buckets=_MEMORY,
            registry=r,
        )

    def begin(self, run: str) -> None:
        """Makes the series of a run that count something; those that are there stay as they are."""
        for name, beginnings in _BEGINNINGS.items():
            for labels in beginnings:
                getattr(self, name).labels(run, *labels)

    def scored(self, run: str, split: str, figures: Mapping[str, float]) -> None:
        """Shows the figures of the version that was scored last."""
        if "accuracy" in figures:
            self.accuracy.labels(run, split).set(figures["accuracy"])
        if "loss" in figures:
            self.loss.labels(run, split).set(figures["loss"])

    def received(self, run: str, norm: float, figures: Mapping[str, float], staleness: int = 0) -> None:
        """Counts an update, which is so many versions behind; `figures` came with it."""
        self.updates.labels(run, "received").inc()
        self.update_staleness.labels(run).observe(staleness)
        self.update_norm.labels(run).observe(norm)
        for name in _OF_CLIENTS:
            if figures.get(name, -1) >= 0:  # a client may send anything finite, and a sum must not fall
                getattr(self, f"client_{name}").labels(run).observe(figures[name])

    def corrupt(self, found: Corruption) -> None:
        """Counts a stored file that is missing or corrupt; may be called in any thread."""
        self.corrupt_files.labels(found.kind).inc()

    def committed(self, run: str, figures: Mapping[str, float]) -> None:
        """Shows the figures of the round that was committed last."""
        if "train_loss" in figures:
            self.loss.labels(run, "train").set(figures["train_loss"])
        if EPSILON in figures:
            self.privacy_epsilon.labels(run).set(figures[EPSILON])

    def registered(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Shows how many clients are registered, by role and silence; what is not named is set to 0."""
        for role, state in itertools.product(_ROLES, _SILENCES):
            self.registered_clients.labels(role, state).set(counts.get((role, state), 0))

    def certificate_expires(self, certificate: str, at: float) -> None:
        """Shows when a certificate ends.

        Args:
            certificate: `server` or `authority`.
            at: Seconds since the epoch.
        """
        self.certificate_expiry_seconds.labels(certificate).set(at)

    def watch_disk(self, place: str, folder: Path) -> None:
        """Shows the room where `folder` is, as it is whenever somebody asks."""
        self.disk_free_bytes.labels(place).set_function(lambda: _room(folder).free)
        self.disk_size_bytes.labels(place).set_function(lambda: _room(folder).total)

    def forget(self, run: str) -> None:
        """Removes all series of a deleted run."""
        self._of_runs.forget(run)

    def serve(self, host: str, port: int) -> MetricsServer:
        """Serves /metrics on a thread of its own.

        Raises:
            SettingsInvalid: If the port cannot be had.
        """
        try:
            return metrics_port.serve(self.registry, host, port, bounds.METRICS)
        except OSError as error:
            raise SettingsInvalid(f"--metrics {host}:{port}: {error.strerror}; name another port") from None


def _room(folder: Path) -> _Room:
    """Returns the room where a folder is; one that cannot be asked must not take all other metrics with it."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return _Room(math.nan, math.nan)
    return _Room(usage.total, usage.free)
