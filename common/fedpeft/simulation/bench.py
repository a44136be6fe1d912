"""The client half of a simulation: one resident model, into which each client's tensors are put when it is its turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest, Tensors
from fedpeft.adapters.updates import PreparedUpdate, prepare
from fedpeft.config import RunConfig
from fedpeft.data.labels import read_label_map
from fedpeft.data.reading import USUAL, Reading
from fedpeft.errors import DataInvalid
from fedpeft.models import backbones
from fedpeft.peft import tune
from fedpeft.rounds import metric_values
from fedpeft.simulation.clients import Arrays, ClientData, ClientMemory, Clients
from fedpeft.training.devices import device_of
from fedpeft.training.learning import learner_of

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Version:
    """An adapter version as clients get it.

    Attributes:
        manifest: What the encoded payload holds.
        tensors: The decoded payload.
    """

    manifest: Manifest
    tensors: Tensors


@dataclass(frozen=True, slots=True)
class Trained:
    """An update that a client would push, and the residuals that it keeps in either outcome."""

    update: PreparedUpdate
    local: Arrays
    examples: int
    metrics: dict[str, float]
    facts: dict[str, str]


class Workbench:
    """Model, data and memory of all clients.

    Args:
        config: The run file.
        clients: Data by client.
        memory: A folder for what clients remember, empty.
        evaluation: Held-out data, if versions are scored.
        weights: A file that stands for the weights that the run names.
        label_map: A file that renames classes, for all data.
        device: auto, cpu, cuda or cuda:N.

    Attributes:
        spec: The tuned tensors.
        fingerprint: Of the frozen ones.
        parameters: Values of the whole model.
        initial: All tuned tensors at the start, by name, float32.
    """

    def __init__(
        self,
        config: RunConfig,
        clients: Clients,
        memory: Path,
        evaluation: Path | None,
        weights: Path | None,
        label_map: Path | None,
        device: str,
        reading: Reading = USUAL,
    ) -> None:
        self._config = config
        self._device = device_of(device)
        self._learner = learner_of(config.model.kind, reading)
        backbone = backbones.build(config.model, config.rounds.seed, weights, str(self._device))
        self._model = tune(backbone, config.peft.method, config.peft.options, config.rounds.seed)
        self.spec = self._model.spec
        self.fingerprint = backbones.fingerprint(backbone, self.spec)
        self.parameters = backbone.parameters
        self.initial = self._model.state()
        shared = {tensor.name for tensor in self.spec.shared}
        self._own = {name: values for name, values in self.initial.items() if name not in shared}
        renamed = None if label_map is None else read_label_map(label_map)
        self._data = ClientData(clients, config, backbone, renamed, reading)
        self._test = None if evaluation is None else self._data.open(evaluation, f"evaluation data {evaluation}")[0]
        self.memory = ClientMemory(memory)

    @property
    def remembers(self) -> bool:
        """True if an update that is not counted leaves anything behind."""
        return self._config.codec.error_feedback or bool(self._own)

    def version(self, tensors: Tensors) -> Version:
        """Returns an adapter version as it arrives at clients, through `codec.down`."""
        manifest, data = payload.encode(tensors, self.spec.shared, self._config.codec.down)
        return Version(manifest, payload.decode(manifest, memoryview(data)))

    def train(self, client: str, number: int, version: Version) -> Trained:
        """Trains a client's round as an agent does, from `version`.

        Raises:
            DataInvalid: If its data cannot be used.
            TrainingFailed: If training ended without an update.
        """
        dataset, kept = self._data.of(client), self.memory.local(client)
        self._model.load({**version.tensors, **self._own, **kept})
        seed = seeds.training(self._config.rounds.seed, number, client)
        try:
            result = self._learner.train(self._model, dataset, self._config.training, seed, number, self._device)
        except DataInvalid as error:
            raise DataInvalid(f"client {client}: {error.message}") from None
        residual = self.memory.residual(client)
        update = prepare(result.delta, residual, self.spec.sent(number), self._config.codec)
        stays = {name: result.local[name] for name in self._own if name in result.local}
        facts = {**result.facts, "threads": str(torch.get_num_threads())}
        metrics = _sendable(result.metrics, metric_values.MAX_TRAINING, client)
        return Trained(update, {**kept, **stays}, result.examples, metrics, facts)

    def score(self, version: Version) -> dict[str, float]:
        """Returns the figures of a version on the held-out data; none without such data."""
        if self._test is None:
            return {}
        self._model.load({**version.tensors, **self._own})
        scored = self._learner.evaluate(self._model, self._test, self._device, self._config.training.precision)
        return _sendable(scored, metric_values.MAX_EVALUATION, "evaluator")


def _sendable(measured: Mapping[str, float], most: int, client: str) -> dict[str, float]:
    """Returns the figures that a client would send; logs how many are left out, and why the first are."""
    kept, dropped = metric_values.sendable(measured, most)
    if dropped:
        cause = "; ".join(dropped[: metric_values.FAULTS_NAMED])
        _log.warning("figures are not kept", client=client, dropped=len(dropped), cause=cause)
    return kept
