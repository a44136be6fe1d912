"""A client's round: a model that stays loaded, and the one function that turns a `LocalJob` into a `LocalUpdate`.

A client's worker and every engine of a simulation call it, so a simulated client and a real one compute the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedpeft.adapters.sections import join, split
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.adapters.updates import Arrays, prepare
from fedpeft.aggregation import strategy
from fedpeft.aggregation.low_rank.ranks import cut, limited, of_rank, padded
from fedpeft.algorithms import algorithm
from fedpeft.config import RunConfig, TrainingConfig
from fedpeft.errors import BudgetExhausted, TrainingFailed
from fedpeft.models import backbones
from fedpeft.models.tasks import Dataset, LabelMap, Task
from fedpeft.peft import TunedModel, tune
from fedpeft.privacy.transforms import transforms_of
from fedpeft.rounds.groups import LOCAL, RESIDUAL
from fedpeft.rounds.local_job import LocalJob, LocalUpdate, Version
from fedpeft.training.evaluation import evaluate
from fedpeft.training.features.division import halves_of
from fedpeft.training.features.feature_store import FeatureStore
from fedpeft.training.local_budget import LocalBudget
from fedpeft.training.loop import Progress, Training, train
from fedpeft.training.randomness import Stream
from fedpeft.training.result import TrainingResult
from fedpeft.training.run_spec import run_spec

NO_UPDATE = (TrainingFailed, BudgetExhausted)
"""Errors of a client's round that ended without an update; the other clients go on."""


@dataclass(frozen=True)
class LoadedRun:
    """A run's model, loaded on a device. Made by `load_run`.

    Attributes:
        config: The run file.
        task: The model's; it reads the data.
        model: The tuned model; its tensors are those of the last job.
        spec: The tensors of versions and updates: the model's, and those of other sections.
        fingerprint: Of the frozen parameters, hexadecimal.
        own: Initial values of the tensors that the server does not have: those that are local in some round.
        device: Device of the computation.
        features: Features that are kept; None if the run keeps none.
    """

    config: RunConfig
    task: Task
    model: TunedModel
    spec: AdapterSpec
    fingerprint: str
    own: Arrays
    device: torch.device
    features: FeatureStore | None = None

    @property
    def trained_task(self) -> Task:
        """The task that trains and scores: the run's, or that over its kept features."""
        return self.task if self.features is None else self.features.task

    @property
    def keeps_uncounted(self) -> bool:
        """True if an update that is not counted changes what its client keeps."""
        privacy = self.config.privacy
        spends = privacy is not None and privacy.is_of_clients  # an update that was made is paid for, counted or not
        return self.config.codec.error_feedback or bool(self.own) or spends

    def dataset(self, source: Any, label_map: LabelMap, cache_bytes: int | None = None) -> Any:
        """Returns a client's data as a data set of this run; see `Task.dataset`."""
        return self.task.dataset(source, self.model.backbone, label_map, cache_bytes)

    def prepared(
        self,
        name: str,
        opened: Callable[[], Any],
        stop: Callable[[], bool] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Any:
        """Returns a data set for `train`, `begin` and `evaluate`: its features, where the run keeps them.

        Without this call they compute the same features batch by batch. Arguments and errors are those of
        `FeatureStore.of`.
        """
        return opened() if self.features is None else self.features.of(name, opened, stop, progress)

    def train(
        self,
        job: LocalJob,
        dataset: Dataset,
        *,
        progress: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> LocalUpdate:
        """Trains a client's round and prepares its update.

        Args:
            job: The work; pickling it does not change the result.
            dataset: The client's data, from `dataset` or `prepared`.
            progress: Called at the beginning, about once a second, and at the end.
            stop: Asked between steps; once true, training ends without a result.

        Raises:
            DataInvalid: If too few examples can be read.
            ModelInvalid: If the version or the local tensors are not of this run's model.
            OSError: If the version's file cannot be read.
            PayloadInvalid: If the version is not what its manifest says.
            StateInvalid: If the residual is of another run.
            TrainingFailed: If training ended without an update.
            BudgetExhausted: If the client's privacy budget is spent.
        """
        budget = LocalBudget.of(self.config, job, len(dataset))  # before anything is trained in vain
        beside = self._set(job.version, job.state.get(LOCAL, {}), self._rank(job))
        self._count_memory()
        result = train(
            self.trained_task,
            self.model,
            dataset,
            job.settings,
            job.seed,
            job.round,
            self.device,
            state=_state(job),
            sections=beside,
            noise=budget.noise,
            progress=progress,
            stop=stop,
        )
        return self.update(job, result, budget)

    def begin(self, job: LocalJob, dataset: Dataset) -> tuple[Training, Stream]:
        """Begins a client's round with tensors of its own, for a pass of several clients; errors as of `train`.

        Returns:
            The training, and the random numbers of the client, from which its start and its steps draw.
        """
        LocalBudget.of(self.config, job, len(dataset))  # before anything is trained in vain
        beside = self._set(job.version, job.state.get(LOCAL, {}), self._rank(job))
        self._count_memory()
        tensors, spec = self.model.copies(job.round), self.model.spec
        stream = Stream(job.seed, self.device)
        task = self.trained_task
        training = Training(task, spec, tensors, dataset, job.settings, job.seed, job.round, self.device)
        with stream.drawn():
            training.start(_state(job), beside)
        return training, stream

    def _count_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def update(self, job: LocalJob, result: TrainingResult, budget: LocalBudget | None = None) -> LocalUpdate:
        """Prepares the update of a client's round.

        Args:
            job: The work.
            result: The result of its training.
            budget: The privacy budget that it was trained with, if that depends on the data.

        Raises:
            StateInvalid: If the residual is of another run.
            TrainingFailed: If nothing of the update can be sent.
        """
        on_gpu = self.device.type == "cuda"
        budget = budget or LocalBudget.of(self.config, job, result.examples)
        memory = {"gpu_memory_bytes": float(torch.cuda.max_memory_allocated(self.device))} if on_gpu else {}
        kept, groups = job.state.get(LOCAL, {}), _groups(job.settings)
        whole = self.spec.sent(job.round)
        sent = of_rank(whole, self._rank(job))
        changes = cut(join(result.delta, result.sections), sent)
        residual = cut(job.state.get(RESIDUAL, {}), sent)
        update = prepare(changes, residual, sent, budget.codec, transforms_of(self.config), job.seed)
        local = {**kept, **{name: result.local[name] for name in self.own if name in result.local}}
        before = {key: job.state.get(key, {}) for key in groups.values()}
        # What the round did not train keeps its state: the halves of RoLoRA take turns.
        counted = {key: {**before[key], **result.state[name]} for name, key in groups.items()}
        return LocalUpdate(
            job.client,
            update,
            {RESIDUAL: padded(update.residual_if_counted, whole), LOCAL: local, **counted, **budget.state},
            {RESIDUAL: padded(update.residual_if_not, whole), LOCAL: local, **before, **budget.state},
            result.examples,
            budget.figures({**result.metrics, **update.figures, **memory}),
            {**result.facts, "threads": str(torch.get_num_threads())},
        )

    def evaluate(
        self, version: Version, dataset: Dataset, progress: Callable[[int], object] | None = None
    ) -> dict[str, float]:
        """Scores a version on held-out data, local tensors at their first values; see `evaluate`."""
        self._set(version, {})
        wanted = self.config.training.precision
        return evaluate(self.trained_task, self.model, dataset, device=self.device, wanted=wanted, progress=progress)

    def _rank(self, job: LocalJob) -> int | None:
        """Returns the rank of a client's factors, where it may be another than the run's."""
        chosen = self.config.aggregation
        return job.rank if job.rank and strategy(chosen.strategy, chosen.options).takes_ranks else None

    def _set(self, version: Version, local: Mapping[str, Any], rank: int | None = None) -> dict[str, Arrays]:
        """Puts a version into the model, as a client of a rank holds it; returns its other sections."""
        adapter, beside = split(self.spec, version.tensors())
        adapter = limited(adapter, self.model.spec.shared, rank)
        self.model.load({**adapter, **self.own, **local})
        return beside


def _groups(settings: TrainingConfig) -> dict[str, str]:
    """Returns the groups of state of the local algorithm, each with the name under which the client keeps it."""
    chosen = settings.algorithm
    return {name: f"{chosen.name}-{name}" for name in algorithm(chosen).groups} if chosen else {}


def _state(job: LocalJob) -> dict[str, Mapping[str, Any]]:
    """Returns the kept state of the local algorithm, by its groups."""
    return {name: job.state.get(key, {}) for name, key in _groups(job.settings).items()}


def load_run(config: RunConfig, task: Task, weights: Path | None, device: torch.device) -> LoadedRun:
    """Builds a run's model.

    Args:
        config: The run file.
        task: The model's.
        weights: A file, or a folder of files, that stands for the weights that the run names.
        device: Device of the computation.

    Raises:
        ConfigInvalid: If an option of the PEFT method is wrong, or the run would keep features and none stay as they
            are.
        ModelInvalid: If the model or its weights cannot be had.
    """
    seed = config.rounds.seed
    backbone = backbones.build(config.model, seed, weights, str(device))
    model = tune(backbone, config.peft.method, config.peft.options, seed)
    shared = {tensor.name for tensor in model.spec.shared}
    own = {name: values for name, values in model.state().items() if name not in shared}
    proof = backbones.fingerprint(backbone, model.spec)
    halves = halves_of(config, task, model)
    features = None if halves is None else FeatureStore(config, task, model.module, halves, device)
    return LoadedRun(config, task, model, run_spec(config, model), proof, own, device, features)
