"""Every Prometheus metric of a client, for the owner of its machine. No label carries a round number.

What the machine is like (machine.py) is looked up when it is asked for. Where there is no GPU, no battery or no sensor,
there is no series of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from fedpeft import metrics_port
from fedpeft.addresses import Address
from fedpeft.errors import SettingsInvalid


class State(StrEnum):
    """Activity of an agent."""

    CONNECTING = "connecting"
    WAITING = "waiting"
    RESTING = "resting"
    JUDGING = "judging"
    PULLING = "pulling"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUSHING = "pushing"


class Metrics:
    """The metrics of one client, in a registry of their own. `run` is the run's id."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        run, direction = ("run",), ("direction",)
        self.rounds = Counter("fedpeft_client_rounds", "Rounds that were trained for.", run, registry=r)
        self.updates = Counter(
            "fedpeft_client_updates", "Updates by what became of them.", ("run", "outcome"), registry=r
        )
        self.evaluations = Counter("fedpeft_client_evaluations", "Versions that were scored.", run, registry=r)
        self.declines = Counter(
            "fedpeft_client_declines", "Runs that were declined, by reason.", ("reason",), registry=r
        )
        self.tickets_given_up = Counter(
            "fedpeft_client_tickets_given_up", "Tickets given back, by reason.", ("run", "reason"), registry=r
        )
        self.evaluations_given_up = Counter(
            "fedpeft_client_evaluations_given_up", "Versions that could not be scored.", run, registry=r
        )
        self.left_out = Counter(
            "fedpeft_client_runs_left_out",
            "Times that a run was left out for a while, because work for it failed.",
            run,
            registry=r,
        )
        self.wire_bytes = Counter(
            "fedpeft_client_wire_bytes", "Whole serialized messages, bytes.", direction, registry=r
        )
        self.payload_bytes = Counter("fedpeft_client_payload_bytes", "Encoded tensors, bytes.", direction, registry=r)
        self.training_seconds = Counter("fedpeft_client_training_seconds", "Seconds of training.", run, registry=r)
        self.images = Counter(
            "fedpeft_client_images", "Images that were trained on, repeats included.", run, registry=r
        )
        self.images_per_second = Gauge(
            "fedpeft_client_training_images_per_second",
            "Rate of the training that is under way, or the last.",
            run,
            registry=r,
        )
        self.loss = Gauge(
            "fedpeft_client_loss", "Loss of the training that is under way, or the last, nats.", run, registry=r
        )
        self.accuracy = Gauge(
            "fedpeft_client_accuracy", "Accuracy of the version scored last, 0 to 1.", run, registry=r
        )
        self.examples = Gauge("fedpeft_client_examples", "Examples of the run's classes.", run, registry=r)
        self.data_rows = Gauge(
            "fedpeft_client_data_rows", "Examples that there are, before any run's labels.", registry=r
        )
        self.gpu_peak = Gauge(
            "fedpeft_client_gpu_memory_peak_bytes", "Most GPU memory that the last training held.", run, registry=r
        )
        self._state = Gauge(
            "fedpeft_client_state", "What the agent is doing: 1 for that, 0 else.", ("state",), registry=r
        )
        self.enter(State.CONNECTING)

    def enter(self, state: State) -> None:
        """Shows what the agent is doing from now on."""
        for each in State:
            self._state.labels(each).set(each is state)
        self._now = state

    @contextmanager
    def during(self, state: State) -> Iterator[None]:
        """Shows what the agent is doing for a while."""
        before = self._now
        self.enter(state)
        try:
            yield
        finally:
            self.enter(before)

    def progressed(self, run: str, progress: Mapping[str, float]) -> None:
        """Shows how far a training is."""
        if "loss" in progress:
            self.loss.labels(run).set(progress["loss"])
        if "images_per_second" in progress:
            self.images_per_second.labels(run).set(progress["images_per_second"])

    def trained(self, run: str, figures: Mapping[str, float]) -> None:
        """Counts a training that gave an update, by its figures."""
        self.rounds.labels(run).inc()
        self.progressed(run, figures)
        seconds = figures.get("seconds", 0.0)
        self.training_seconds.labels(run).inc(seconds)
        self.images.labels(run).inc(round(seconds * figures.get("images_per_second", 0.0)))
        if "gpu_memory_bytes" in figures:
            self.gpu_peak.labels(run).set(figures["gpu_memory_bytes"])

    def scored(self, run: str, figures: Mapping[str, float]) -> None:
        """Counts a version that was scored, by its figures."""
        self.evaluations.labels(run).inc()
        if "accuracy" in figures:
            self.accuracy.labels(run).set(figures["accuracy"])

    @contextmanager
    def served(self, address: str) -> Iterator[None]:
        """Serves /metrics at HOST:PORT on a thread of its own; does nothing if that is empty.

        Raises:
            SettingsInvalid: If the port cannot be had.
        """
        if not address:
            yield
            return
        at = Address.parse(address)
        try:
            server = metrics_port.serve(self.registry, at.host, at.port)
        except OSError as error:
            raise SettingsInvalid(f"--metrics {address}: {error.strerror}; name another port") from None
        try:
            yield
        finally:
            server.shutdown()
            server.server_close()
