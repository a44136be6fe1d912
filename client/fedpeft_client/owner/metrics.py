"""Every Prometheus metric of a client, for the owner of its machine. No label carries a round number.

What the machine is like (machine.py) is looked up when it is asked for. Where there is no GPU, no battery or no sensor,
there is no series of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from fedpeft.errors import SettingsInvalid
from fedpeft.process import metrics_port
from fedpeft.process.addresses import Address
from fedpeft_client.owner.run_series import RunSeries


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
    """The metrics of one client, in a registry of their own. `run` is the run's id.

    Attributes:
        series: The runs that have series.
    """

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.series = RunSeries()
        run, direction, of = ("run",), ("direction",), self.series.of
        self.rounds = of(Counter("fedpeft_client_rounds", "Completed local trainings.", run, registry=r))
        self.updates = of(Counter("fedpeft_client_updates", "Updates by outcome.", ("run", "outcome"), registry=r))
        self.evaluations = of(Counter("fedpeft_client_evaluations", "Versions scored.", run, registry=r))
        self.declines = Counter("fedpeft_client_declines", "Runs declined, by reason.", ("reason",), registry=r)
        self.tickets_given_up = of(
            Counter("fedpeft_client_tickets_given_up", "Tickets withdrawn, by reason.", ("run", "reason"), registry=r)
        )
        self.evaluations_given_up = of(
            Counter(
                "fedpeft_client_evaluations_given_up", "Versions that this evaluator failed to score.", run, registry=r
            )
        )
        self.left_out = of(
            Counter(
                "fedpeft_client_runs_left_out",
                "Times that a run was skipped for a while because work for it had failed.",
                run,
                registry=r,
            )
        )
        self.wire_bytes = Counter(
            "fedpeft_client_wire_bytes",
            "Size of serialized messages, bytes; `up` is client to server, `down` server to client.",
            direction,
            registry=r,
        )
        self.payload_bytes = Counter(
            "fedpeft_client_payload_bytes", "Size of encoded tensors, bytes.", direction, registry=r
        )
        self._declare_training()
        self._state = Gauge(
            "fedpeft_client_state", "1 for the state that the agent is in, 0 for the others.", ("state",), registry=r
        )
        self.enter(State.CONNECTING)

    def _declare_training(self) -> None:
        r, run, of = self.registry, ("run",), self.series.of
        self.training_seconds = of(
            Counter("fedpeft_client_training_seconds", "Time spent in local training, seconds.", run, registry=r)
        )
        self.images = of(
            Counter("fedpeft_client_images", "Images processed in training, repetitions included.", run, registry=r)
        )
        self.images_per_second = of(
            Gauge(
                "fedpeft_client_training_images_per_second",
                "Speed of the current or most recent training, images per second.",
                run,
                registry=r,
            )
        )
        self.loss = of(
            Gauge("fedpeft_client_loss", "Loss of the current or most recent training, nats.", run, registry=r)
        )
        self.accuracy = of(
            Gauge("fedpeft_client_accuracy", "Accuracy of the most recently scored version, 0 to 1.", run, registry=r)
        )
        self.examples = of(
            Gauge(
                "fedpeft_client_examples", "Local examples whose labels are among the run's classes.", run, registry=r
            )
        )
        self.data_rows = Gauge("fedpeft_client_data_rows", "Local examples, whatever their labels.", registry=r)
        self.gpu_peak = of(
            Gauge(
                "fedpeft_client_gpu_memory_peak_bytes",
                "Peak GPU memory of the most recent training, bytes.",
                run,
                registry=r,
            )
        )

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
