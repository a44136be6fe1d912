"""Every Prometheus metric of the daemon. No label carries a round number or a client id.

A run's series disappear when the run is deleted.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from fedpeft.errors import SettingsInvalid

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
_NORMS = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1e3, 1e4)


class Metrics:
    """The metrics of one daemon, in a registry of their own. `run` is the run's id, empty for none."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        direction, run = ("run", "direction"), ("run",)
        self.wire_bytes = Counter("fedpeft_wire_bytes", "Whole serialized messages, bytes.", direction, registry=r)
        self.payload_bytes = Counter(
            "fedpeft_payload_bytes", "Encoded tensors, bytes.", (*direction, "encoding"), registry=r
        )
        self.round_bytes = Gauge("fedpeft_round_bytes", "Wire bytes of the round in progress.", direction, registry=r)
        self.last_round_bytes = Gauge(
            "fedpeft_last_round_bytes", "Wire bytes of the last committed round.", direction, registry=r
        )
        self.round = Gauge("fedpeft_round", "Number of the round in progress.", run, registry=r)
        self.rounds = Counter("fedpeft_rounds", "Rounds by how they ended.", ("run", "outcome"), registry=r)
        self.round_seconds = Histogram(
            "fedpeft_round_seconds", "Duration of a round's phases.", ("run", "phase"), buckets=_SECONDS, registry=r
        )
        self.updates = Counter("fedpeft_updates", "Updates by what became of them.", ("run", "outcome"), registry=r)
        self.clients = Gauge("fedpeft_clients", "Clients by what they are doing.", ("run", "state"), registry=r)
        self.accuracy = Gauge("fedpeft_accuracy", "Accuracy of the version scored last.", ("run", "split"), registry=r)
        self.loss = Gauge("fedpeft_loss", "Mean loss of the newest version, nats.", ("run", "split"), registry=r)
        self.update_norm = Histogram(
            "fedpeft_update_norm", "Euclidean norm of a decoded update.", run, buckets=_NORMS, registry=r
        )
        self.requests = Counter("fedpeft_grpc_requests", "Calls by method and code.", ("method", "code"), registry=r)
        self.request_seconds = Histogram(
            "fedpeft_grpc_request_seconds", "Duration of calls.", ("method",), buckets=_SECONDS, registry=r
        )

    def scored(self, run: str, split: str, figures: Mapping[str, float]) -> None:
        """Shows the figures of the version that was scored last."""
        if "accuracy" in figures:
            self.accuracy.labels(run, split).set(figures["accuracy"])
        if "loss" in figures:
            self.loss.labels(run, split).set(figures["loss"])

    def committed(self, run: str, figures: Mapping[str, float]) -> None:
        """Shows the figures of the round that was committed last."""
        if "train_loss" in figures:
            self.loss.labels(run, "train").set(figures["train_loss"])

    def forget(self, run: str) -> None:
        """Removes all series of a deleted run."""
        for metric in vars(self).values():
            if isinstance(metric, Counter | Gauge | Histogram) and "run" in metric._labelnames:
                metric.remove_by_labels({"run": run})

    def serve(self, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
        """Serves /metrics on a thread of its own.

        Raises:
            SettingsInvalid: If the port cannot be had.
        """
        try:
            return start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise SettingsInvalid(f"--metrics {host}:{port}: {error.strerror}; name another port") from None
