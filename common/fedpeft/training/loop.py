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
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch
from torch import nn
from torch.nn import functional

from fedpeft.algorithms import RoundStart, algorithm
from fedpeft.config import TrainingConfig
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.formatting import counted
from fedpeft.models.tasks import Batch, Dataset, Pass, Task
from fedpeft.peft import TunedModel
from fedpeft.rounds.local_job import Groups
from fedpeft.training.algorithm_state import to_arrays, to_tensors
from fedpeft.training.batches import BatchOrder, ahead, moved, pinned, size, split
from fedpeft.training.loss_meter import LossMeter
from fedpeft.training.precision import Steps, autocast, lowered, multiplying, precision
from fedpeft.training.randomness import Generators, seeded
from fedpeft.training.result import TrainingResult, facts_of, result_of

PROGRESS_S = 1.0
"""Seconds between two reports of progress, at least."""

LOSS_STEPS = 25
"""Steps on a GPU between two looks at the loss: each look waits for the GPU."""

_log = structlog.get_logger(__name__)


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
        progress: Called at the beginning, about once a second, and at the end.
        stop: Asked between steps; once true, training ends without a result.

    Raises:
        DataInvalid: If no example can be read, or more than 1 % cannot.
        TrainingFailed: If `stop` asked for it, the loss or a tensor became infinite or NaN, or not even one example
            fits into the GPU's memory.
    """
    device = torch.device(device)
    training = _Training(task, model, dataset, settings, seed, number, device)
    with seeded(seed, device), multiplying(settings.precision, device):
        try:
            return training.run(state or {}, sections or {}, progress, stop)
        finally:
            model.eval()


def placed(module: nn.Module, device: torch.device) -> None:
    """Moves a model to a device; on a GPU channels last, with which the patch embedding of images is faster."""
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


class _Training:
    """The state of one call of `train`."""

    def __init__(
        self,
        task: Task,
        model: TunedModel,
        dataset: Dataset,
        settings: TrainingConfig,
        seed: int,
        number: int,
        device: torch.device,
    ) -> None:
        self._task = task
        self._model = model
        self._dataset = dataset
        self._settings = settings
        self._seed = seed
        self._number = number
        self._device = device
        self._on_gpu = device.type == "cuda"
        placed(model.module, device)
        self._dtype = precision(settings.precision, device)
        parameters = model.trainable(number)
        if not parameters:
            raise TrainingFailed(f"adapter {model.spec.method} trains no tensor in round {number}")
        self._sent = {tensor.name: parameters[tensor.name] for tensor in model.spec.sent(number)}
        self._algorithm = algorithm(settings.algorithm)
        optimizer = optimizer_of(settings, list(parameters.values()))
        largest = settings.clip_gradient_norm
        self._steps = Steps(optimizer, self._dtype, device, self._algorithm.after_gradient, largest)
        self._micro = settings.batch_size
        self._losses = LossMeter(LOSS_STEPS if self._on_gpu else 1)
        self._order = BatchOrder(settings, len(dataset), seed)

    def run(
        self,
        state: Groups,
        sections: Groups,
        progress: Callable[[Progress], None] | None,
        stop: Callable[[], bool] | None,
    ) -> TrainingResult:
        """Trains and returns the result."""
        start = self._model.state()
        self._model.train()
        kept = to_tensors(self._algorithm.groups, state, self._sent)
        beside = to_tensors((each.name for each in self._algorithm.sections()), sections, self._sent)
        self._algorithm.start(RoundStart(self._sent, self._settings.learning_rate, kept, beside))
        metrics = self._train(progress, stop)
        end = self._algorithm.finish(int(metrics["steps"]))
        facts = facts_of(self._device, self._dtype)
        result = result_of(self._model, start, self._number, self._dataset.examples, metrics, facts)
        return replace(result, state=to_arrays(end.state), sections=to_arrays(end.sections))

    def _train(self, progress: Callable[[Progress], None] | None, stop: Callable[[], bool] | None) -> dict[str, float]:
        """Makes all steps and returns their figures."""
        steps = self._order.steps
        began = reported = time.perf_counter()
        done = examples = 0
        if progress is not None:
            progress(Progress(0, steps, math.nan, 0.0))
        with ExitStack() as until_the_end:
            until_the_end.enter_context(lowered(self._model.module, self._dtype))
            for ready in until_the_end.enter_context(closing(self._batches())):
                if not ready.examples:
                    continue
                if stop is not None and stop():
                    raise TrainingFailed(f"training was stopped as asked, after {done} of {counted(steps, 'step')}")
                done += 1
                examples += ready.examples
                self._losses.add(self._step(ready.batch), ready.examples, ready.last_pass)
                now = time.perf_counter()
                if progress is not None and (now - reported >= PROGRESS_S or ready.at == steps - 1):
                    reported = now
                    progress(Progress(done, steps, self._losses.flush(), examples / (now - began)))
        self._losses.flush()
        seconds = time.perf_counter() - began
        if not done:
            raise DataInvalid(f"none of the {len(self._dataset)} {self._task.example}s can be read")
        return {
            **self._losses.metrics(),
            "seconds": seconds,
            "images_per_second": examples / seconds,
            "steps": float(done),
            "skipped_images": float(len(self._dataset) - self._dataset.examples),
            "micro_batch": float(self._micro),
            "threads": float(torch.get_num_threads()),
        }

    def _batches(self) -> Generator[_Ready]:
        """Yields every batch collated; on a GPU by a thread, so that the GPU does not wait for it."""
        drawn = enumerate(self._dataset.batches(self._order))
        if self._on_gpu:
            yield from ahead(drawn, lambda each: self._ready(*each))
        else:
            for position, rows in drawn:
                yield self._ready(position, rows)

    def _ready(self, position: int, rows: Any) -> _Ready:
        a_pass, steps = self._order.batches_per_pass, self._order.steps
        batch = self._task.collate(rows, Pass(self._settings, self._seed, position // a_pass)) if len(rows) else {}
        return _Ready(pinned(batch) if self._on_gpu else batch, len(rows), position >= steps - a_pass, position)

    def _step(self, batch: Batch) -> torch.Tensor:
        """Makes one optimizer step and returns its loss; halves the micro-batch until it fits."""
        batch = moved(batch, self._device)
        generators = Generators.of(self._device)
        while True:
            if (loss := self._gradients(batch)) is None:
                self._smaller_micro_batch(size(batch))
            elif self._steps.take():
                return loss
            generators.restore()

    def _gradients(self, batch: Batch) -> torch.Tensor | None:
        """Adds up the gradients of the batch's mean loss over micro-batches.

        Returns:
            That loss; None if a micro-batch does not fit into memory, with no gradient left.
        """
        total = torch.zeros((), device=self._device)
        try:
            for part in split(batch, self._micro):
                inputs = self._task.transform(part, self._dataset)
                with autocast(self._dtype, self._device):
                    losses = self._task.loss(self._model.module, inputs)
                loss = _mean(losses, size(part), type(self._task).__name__) * (size(part) / size(batch))
                self._steps.backward(loss)
                total += loss.detach()
            return total
        except torch.OutOfMemoryError:
            self._steps.clear()
        return None  # outside the handler: while it runs, the exception holds the tensors that filled the memory

    def _smaller_micro_batch(self, batch: int) -> None:
        held = min(self._micro, batch)
        if held > 1:
            self._micro = -(-held // 2)
        elif not self._model.checkpoint():
            raise TrainingFailed(
                f"not even one {self._task.example} fits into the memory of {self._device}; take a smaller model or "
                "input"
            )
        if self._on_gpu:
            torch.cuda.empty_cache()
        drops = any(isinstance(part, nn.Dropout) and part.p and part.training for part in self._model.module.modules())
        _log.warning(
            "out_of_gpu_memory",
            images=held,
            micro_batch=self._micro,
            checkpointing=self._model.checkpointing,
            effect="gradients add up to the batch's" + (", with other draws of dropout" if drops else ""),
        )


def _mean(losses: torch.Tensor, examples: int, task: str) -> torch.Tensor:
    """Returns the mean of a batch's losses, added up in the order of torch's own mean cross entropy: to its bits."""
    if losses.shape != (examples,):
        raise TrainingFailed(f"{task}.loss returned {tuple(losses.shape)}; a loss for each of {examples} is needed")
    only = torch.zeros(examples, dtype=torch.int64, device=losses.device)
    return functional.nll_loss(-losses.float().unsqueeze(1), only)


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
