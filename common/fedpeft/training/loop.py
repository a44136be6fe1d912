"""Local training: one client's work in one round, the same loop for every task.

Notable:
- The optimizer is new in every call: no momentum passes from one client or round to another.
- The last, smaller batch is trained too, and an update weighs by the true number of examples.
- A batch that does not fit into GPU memory is cut in halves whose gradients add up to the batch's. Dropout draws other
  masks for halves, so only a model without it makes the same step.
- A gradient is clipped once a step: of the whole batch, unscaled, before the local algorithm adds its part.
- A step whose float16 gradients overflow is repeated with a smaller scale: none is lost.
- On a GPU, batches are augmented and pinned by a thread, ahead of the steps.
- On the CPU a repeat with the same seed and number of threads is bit-identical.
- Training that hides single examples (`example_gradients.py`) has Poisson batches, and a seed that nobody knows.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from fedpeft.adapters.spec import AdapterSpec
from fedpeft.algorithms import RoundStart, algorithm
from fedpeft.config import TrainingConfig
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.formatting import counted
from fedpeft.models.tasks import Batch, Dataset, Pass, Task
from fedpeft.peft import TunedModel, arrays_of
from fedpeft.rounds.local_job import Groups
from fedpeft.training.algorithm_state import to_arrays, to_tensors
from fedpeft.training.batches import BatchOrder, ahead, moved, pinned
from fedpeft.training.example_gradients import ExampleGradients, ExampleNoise
from fedpeft.training.gradients import Gradients
from fedpeft.training.loss_meter import LossMeter
from fedpeft.training.poisson import PoissonOrder
from fedpeft.training.precision import Steps, lowered, multiplying, precision
from fedpeft.training.randomness import Generators, seeded
from fedpeft.training.result import TrainingResult, facts_of, result_of

PROGRESS_S = 1.0
"""Seconds between two reports of progress, at least."""

LOSS_STEPS = 25
"""Steps on a GPU between two looks at the loss: each look waits for the GPU."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of training.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        loss: Mean loss of the last step that was looked at; NaN before the first.
        images_per_second: Mean rate since the beginning; of examples, where these are no images.
    """

    step: int
    steps: int
    loss: float
    images_per_second: float


def train(
    task: Task,
    model: TunedModel,
    dataset: Dataset,
    settings: TrainingConfig,
    seed: int,
    number: int,
    device: torch.device | str = "cpu",
    *,
    state: Groups | None = None,
    sections: Groups | None = None,
    noise: ExampleNoise | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Trains the tuned tensors of round `number` from the values they have.

    Args:
        task: The model's.
        model: The model, its tensors those of the adapter version to start from; it ends trained, in evaluation mode.
        dataset: The client's data.
        settings: Epochs or steps, optimizer, precision, augmentation, local algorithm.
        seed: Seed of this training, see `fedpeft.seeds.training`. Torch's global generators are left as they were.
        number: The round (1, 2, ...): it chooses each tensor's role.
        device: Device of the training.
        state: The client's kept state for the local algorithm, by group and tensor; an absent group is zeros.
        sections: Received sections beside the adapter, by section and tensor; likewise.
        noise: Bound and noise that hide each example; None trains without.
        progress: Called at the beginning, about once a second, and at the end.
        stop: Asked between steps; once true, training ends without a result.

    Raises:
        DataInvalid: If no example can be read, or more than 1 % cannot.
        TrainingFailed: If `stop` asked for it, the loss or a tensor became infinite or NaN, or not even one example
            fits into the GPU's memory.
    """
    device = torch.device(device)
    placed(model.module, device)
    model.trainable(number)
    if noise is not None:  # with the run's, which is known, augmentation would tell who was drawn
        seed = secrets.randbits(63)
    training = Training(task, model.spec, model.tensors, dataset, settings, seed, number, device, noise is not None)
    compute = _gradients(task, model, training, noise)
    with seeded(seed, device), multiplying(settings.precision, device):
        try:
            training.start(state or {}, sections or {})
            model.train()
            with lowered(model.module, training.dtype), closing(training.steps(progress, stop)) as steps:
                batch = next(steps, None)
                while batch is not None:
                    batch = following(steps, compute(batch))
            return training.result()
        finally:
            model.eval()


def _gradients(
    task: Task, model: TunedModel, training: Training, noise: ExampleNoise | None
) -> Callable[[Batch], torch.Tensor]:
    """Returns the function that leaves a batch's gradients at the parameters of a model and returns its mean loss."""
    dtype, device = training.dtype, training.device
    if noise is None:
        gradients = Gradients(task, model, dtype, device)
        return lambda batch: gradients.compute(training, batch, lambda inputs: task.loss(model.module, inputs))
    expected = min(training.micro, len(training.dataset))
    hiding = ExampleGradients(task, model, noise, expected, dtype, device)
    return lambda batch: hiding.compute(training, batch)


def following(steps: Generator[Batch, torch.Tensor], loss: torch.Tensor) -> Batch | None:
    """Returns the batch that a training computes next, given the loss of the one before; None after the last."""
    try:
        return steps.send(loss)
    except StopIteration:
        return None


def placed(module: nn.Module, device: torch.device) -> None:
    """Moves a model to a device; on a GPU channels last, with which the patch embedding of images is faster."""
    if device.type == "cpu" and all(t.device == device for t in chain(module.parameters(), module.buffers())):
        return  # the usual case of a CPU: `to` takes longer to find that out
    module.to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A batch on its way to the device.

    Attributes:
        batch: Collated; pinned for a GPU.
        examples: Their number; 0 if none of the batch could be read.
        last_pass: True in the last pass over the data.
        at: Its position among all batches.
    """

    batch: Batch
    examples: int
    last_pass: bool
    at: int


class Training:
    """One client's work in one round, but for its gradients: others compute them, one client's or many at once.

    Args:
        task: The model's.
        spec: The tuned tensors.
        tensors: All of them with their first values, on the device; those that require a gradient are trained.
        dataset: The client's data.
        settings: As in `train`.
        seed: Seed of this training; torch's global generators are to be seeded with it before `start`.
        number: The round.
        device: Device of the training.
        sampled: True for Poisson batches, each of which makes a step, even an empty one.

    Attributes:
        tensors: Those.
        dataset: That.
        device: That.
        dtype: In which the forward pass computes.
        optimizer_steps: The optimizer; gradients are given to it.
        micro: Most examples that go through the model at once.
    """

    def __init__(
        self,
        task: Task,
        spec: AdapterSpec,
        tensors: Mapping[str, nn.Parameter],
        dataset: Dataset,
        settings: TrainingConfig,
        seed: int,
        number: int,
        device: torch.device,
        sampled: bool = False,
    ) -> None:
        self._task = task
        self._spec = spec
        self._settings = settings
        self._seed = seed
        self._number = number
        self.device = device
        self._sampled = sampled
        self._on_gpu = device.type == "cuda"
        parameters = {name: p for name, p in tensors.items() if p.requires_grad}
        if not parameters:
            raise TrainingFailed(f"adapter {spec.method} trains no tensor in round {number}")
        self.tensors = tensors
        self.dataset = dataset
        self.dtype = precision(settings.precision, device)
        self.micro = settings.batch_size
        self._sent = {tensor.name: parameters[tensor.name] for tensor in spec.sent(number)}
        self._algorithm = algorithm(settings.algorithm)
        optimizer = optimizer_of(settings, list(parameters.values()))
        largest = settings.clip_gradient_norm
        self.optimizer_steps = Steps(optimizer, self.dtype, device, self._algorithm.after_gradient, largest)
        self._losses = LossMeter(LOSS_STEPS if self._on_gpu else 1)
        examples = len(dataset)
        self._order = PoissonOrder(settings, examples) if sampled else BatchOrder(settings, examples, seed)
        self._metrics: dict[str, float] = {}

    def start(self, state: Groups, sections: Groups) -> None:
        """Notes the first values, and begins the local algorithm; state and sections as in `train`."""
        self._first = arrays_of(self.tensors)
        kept = to_tensors(self._algorithm.groups, state, self._sent)
        beside = to_tensors((each.name for each in self._algorithm.sections()), sections, self._sent)
        self._algorithm.start(RoundStart(self._sent, self._settings.learning_rate, kept, beside))

    def steps(
        self, progress: Callable[[Progress], None] | None = None, stop: Callable[[], bool] | None = None
    ) -> Generator[Batch, torch.Tensor]:
        """Makes all steps; progress and stop as in `train`.

        Yields:
            A batch on the device, whose mean loss is to be sent back once the parameters have its gradients. Where
            those overflow, the batch comes again.
        """
        steps = self._order.steps
        began = reported = time.perf_counter()
        done = examples = 0
        if progress is not None:
            progress(Progress(0, steps, math.nan, 0.0))
        with closing(self._batches()) as batches:
            for ready in batches:
                if not ready.examples and not self._sampled:
                    continue
                if stop is not None and stop():
                    raise TrainingFailed(f"training was stopped as asked, after {done} of {counted(steps, 'step')}")
                done += 1
                examples += ready.examples
                self._losses.add((yield from self._step(ready.batch)), ready.examples, ready.last_pass)
                now = time.perf_counter()
                if progress is not None and (now - reported >= PROGRESS_S or ready.at == steps - 1):
                    reported = now
                    progress(Progress(done, steps, self._losses.flush(), examples / (now - began)))
        self._losses.flush()
        seconds = time.perf_counter() - began
        if not done:
            raise DataInvalid(f"none of the {len(self.dataset)} {self._task.example}s can be read")
        self._metrics = {
            **self._losses.metrics(),
            "seconds": seconds,
            "images_per_second": examples / seconds,
            "steps": float(done),
            "skipped_images": float(len(self.dataset) - self.dataset.examples),
            "micro_batch": float(self.micro),
            "threads": float(torch.get_num_threads()),
        }

    def result(self) -> TrainingResult:
        """Returns the result, after the last step."""
        end = self._algorithm.finish(int(self._metrics["steps"]))
        facts = facts_of(self.device, self.dtype)
        trained, examples = arrays_of(self.tensors), self.dataset.examples
        result = result_of(self._spec, self._first, trained, self._number, examples, self._metrics, facts)
        return replace(result, state=to_arrays(end.state), sections=to_arrays(end.sections))

    def _batches(self) -> Generator[_Ready]:
        """Yields every batch collated; on a GPU by a thread, so that the GPU does not wait for it."""
        drawn = enumerate(self.dataset.batches(self._order))
        if self._on_gpu:
            yield from ahead(drawn, lambda each: self._ready(*each))
        else:
            for position, rows in drawn:
                yield self._ready(position, rows)

    def _ready(self, position: int, rows: Any) -> _Ready:
        a_pass, steps = self._order.batches_per_pass, self._order.steps
        batch = self._task.collate(rows, Pass(self._settings, self._seed, position // a_pass)) if len(rows) else {}
        return _Ready(pinned(batch) if self._on_gpu else batch, len(rows), position >= steps - a_pass, position)

    def _step(self, batch: Batch) -> Generator[Batch, torch.Tensor, torch.Tensor]:
        """Makes one optimizer step and returns its loss."""
        batch = moved(batch, self.device)
        generators = Generators.of(self.device)
        while True:
            loss = yield batch
            if self.optimizer_steps.take():
                return loss
            generators.restore()


def optimizer_of(settings: TrainingConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns a new optimizer as `[training]` says."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
