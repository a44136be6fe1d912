"""The client half of a simulation in one process: a loaded model, and the data of the clients whose turn it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from fedpeft.config import RunConfig
from fedpeft.data.division import drawn_rows
from fedpeft.data.labels import read_label_map
from fedpeft.data.reading import USUAL, Reading
from fedpeft.errors import DataInvalid
from fedpeft.models.tasks import task_of
from fedpeft.rounds import metric_values
from fedpeft.rounds.local_job import LocalFailure, LocalJob, LocalOutcome, LocalUpdate, Version
from fedpeft.simulation.clients import ClientData, Clients, Data, place_of
from fedpeft.training.devices import device_of
from fedpeft.training.local_round import NO_UPDATE, load_run
from fedpeft.training.loop import Training
from fedpeft.training.randomness import Stream

HELD_OUT_SEED = 0
"""Seed of the held-out examples: those of all runs are the same, whatever their own seeds are."""
HELD_OUT = ""
"""Name of the held-out data among those whose features are kept; no client has it."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Inputs of a simulation, picklable: every process that trains loads model and data from them.

    Attributes:
        config: The run file.
        clients: Data by client.
        evaluation: Held-out data, if versions are scored.
        weights: A file that stands for the weights that the run names.
        label_map: A file that renames classes, for all data.
        device: auto, cpu, cuda or cuda:N.
        reading: Settings of reading images.
        held_out: Number of examples of the held-out data that are scored; None: all of them.
        ranks: Ranks of LoRA factors that clients bear, in turn by name; empty: any.
    """

    config: RunConfig
    clients: Clients
    evaluation: Path | Data | None = None
    weights: Path | None = None
    label_map: Path | None = None
    device: str = "cpu"
    reading: Reading = USUAL
    held_out: int | None = None
    ranks: tuple[int, ...] = ()


class LocalTrainer:
    """Trains and scores for all clients, one after the other.

    Args:
        inputs: Files to load.

    Attributes:
        inputs: Those.
        run: The loaded model.

    Raises:
        ConfigInvalid: As `load_run`.
        DataInvalid: If the held-out data, or the label map, cannot be used.
        ModelInvalid: If the model or its weights cannot be had.
        SettingsInvalid: If there is no such device.
    """

    def __init__(self, inputs: Inputs) -> None:
        config = inputs.config
        self.inputs = inputs
        task = task_of(config.model.task).reading(inputs.reading)
        self.run = load_run(config, task, inputs.weights, device_of(inputs.device))
        renamed = None if inputs.label_map is None else read_label_map(inputs.label_map)
        self._data = ClientData(inputs.clients, self.run, renamed)
        self._test = None if inputs.evaluation is None else self._held_out(inputs.evaluation)

    def train(self, job: LocalJob) -> LocalOutcome:
        """Trains a client's round as an agent does.

        Raises:
            DataInvalid: If the client's data cannot be used.
        """
        try:
            with naming(job.client):
                return self.figures_of(self.run.train(job, self._prepared(job.client)))
        except NO_UPDATE as error:
            return LocalFailure(job.client, error)

    def begin(self, job: LocalJob) -> tuple[Training, Stream]:
        """Begins a client's round beside others; see `LoadedRun.begin`."""
        with naming(job.client):
            return self.run.begin(job, self._prepared(job.client))

    def _prepared(self, client: str) -> Any:
        """Returns a client's data; opens them only if its features are not kept."""
        return self.run.prepared(client, lambda: self._data.of(client))

    def figures_of(self, update: LocalUpdate) -> LocalUpdate:
        """Returns an update with the figures that a client would send."""
        return replace(update, metrics=_sendable(update.metrics, metric_values.MAX_TRAINING, update.client))

    def _held_out(self, data: Path | Data) -> Any:
        """Opens the held-out data; with `held_out`, so many examples of it, the same in every run."""
        named = f"evaluation data {data}" if isinstance(data, Path) else "evaluation data"
        if self.inputs.held_out is not None:
            task = self.run.task
            whole = task.read(place_of(data, self.inputs.config)) if isinstance(data, Path) else data
            data = task.select(whole, drawn_rows(len(whole), self.inputs.held_out, HELD_OUT_SEED))
        return self._data.open(data, named)[0]

    def evaluate(self, version: Version) -> dict[str, float]:
        """Returns the figures of a version on the held-out data; none without such data."""
        if self._test is None:
            return {}
        test = self.run.prepared(HELD_OUT, lambda: self._test)
        return _sendable(self.run.evaluate(version, test), metric_values.MAX_EVALUATION, "evaluator")


@contextmanager
def naming(client: str) -> Iterator[None]:
    """Puts a client's name before the message of `DataInvalid`, unless it is there."""
    name = f"client {client}: "
    try:
        yield
    except DataInvalid as error:
        raise DataInvalid(f"{name}{error.message.removeprefix(name)}") from None


def _sendable(measured: Mapping[str, float], most: int, client: str) -> dict[str, float]:
    """Returns the figures that a client would send; logs how many are left out, and why the first are."""
    kept, dropped = metric_values.sendable(measured, most)
    if dropped:
        cause = "; ".join(dropped[: metric_values.FAULTS_NAMED])
        _log.warning("figures are not kept", client=client, dropped=len(dropped), cause=cause)
    return kept
