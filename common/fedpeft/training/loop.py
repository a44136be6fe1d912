"""Local training: one client's work in one round.

Notable:
- The optimizer is new in every call: no momentum passes from one client or round to another.
- The last, smaller batch is trained too, and an update weighs by the true number of images.
- A batch that does not fit into GPU memory is cut in halves whose gradients add up to the batch's. Dropout draws other
  masks for halves, so only a model without it makes the same step.
- A step whose float16 gradients overflow is repeated with a smaller scale: none is lost.
- On a GPU, batches are augmented and pinned by a thread, ahead of the steps.
- On the CPU a repeat with the same seed and number of threads is bit-identical.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedpeft.adapters.spec import TensorRole
from fedpeft.config import TrainingConfig
from fedpeft.data.dataset import Batch, ImageDataset
from fedpeft.data.transforms import augment
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.formatting import counted
from fedpeft.peft import TunedModel
from fedpeft.training.batches import Orders, ahead
from fedpeft.training.precision import Steps, autocast, lowered, multiplying, precision
from fedpeft.training.randomness import Generators, seeded

PROGRESS_S = 1.0
"""Seconds between two reports of progress, at least."""

LOSS_STEPS = 25
"""Steps on a GPU between two looks at the loss: each look waits for the GPU."""

_log = structlog.get_logger(__name__)

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of training.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        loss: Mean cross-entropy of the last step that was looked at; NaN before the first.
        images_per_second: Mean rate since the beginning; of examples, where these are no images.
    """

    step: int
    steps: int
    loss: float
    images_per_second: float


@dataclass(frozen=True)
class TrainingResult:
    """Result of a client's round.

    Attributes:
        delta: Trained minus start of every tensor sent in this round, float32.
        local: New values of every tensor that stays here in this round, float32.
        examples: Images of the data set that could be read: the weight of the update.
        metrics: loss (mean over the last pass), loss_first, loss_last (of single steps), seconds, images_per_second,
            steps, skipped_images, micro_batch (images that went through the model at once), threads.
        facts: torch's version, device and precision.
    """

    delta: Arrays
    local: Arrays
    examples: int
    metrics: dict[str, float]
    facts: dict[str, str]


def train(
    model: TunedModel,
    dataset: ImageDataset,
    settings: TrainingConfig,
    seed: int,
    number: int,
    device: torch.device | str = "cpu",
    *,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Trains the tuned tensors of round `number` from the values they have.

    Args:
        model: The model, its tensors those of the adapter version to start from; it ends trained, in evaluation mode.
        dataset: The client's images.
        settings: Epochs or steps, optimizer, precision, augmentation.
        seed: Seed of this training, see `fedpeft.seeds.training`. Torch's global generators are left as they were.
        number: The round (1, 2, ...): it chooses each tensor's role.
        device: Where to train.
        progress: Called at the beginning, about once a second, and at the end.
        stop: Asked between steps; once true, training ends without a result.

    Raises:
        DataInvalid: If no image can be read, or more than 1 % cannot.
        TrainingFailed: If `stop` asked for it, the loss or a tensor became infinite or NaN, or not even one image fits
            into the GPU's memory.
    """
    device = torch.device(device)
    training = _Training(model, dataset, settings, seed, number, device)
    with seeded(seed, device), multiplying(settings.precision, device):
        try:
            return training.run(progress, stop)
        finally:
            model.eval()


def placed(module: nn.Module, device: torch.device) -> None:
    """Moves a model of images to a device; on a GPU channels last, with which the patch embedding is faster."""
    module.to(device)
    if device.type == "cuda":
        module.to(memory_format=torch.channels_last)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A batch on its way to the device.

    Attributes:
        images: uint8[n, 3, side, side], augmented; pinned for a GPU.
        labels: int64[n], likewise.
        last_pass: Whether it is of the last pass over the data.
        at: Its position among all batches.
    """

    images: torch.Tensor
    labels: torch.Tensor
    last_pass: bool
    at: int

    def __len__(self) -> int:
        return len(self.labels)


class _Training:
    """The state of one call of `train`."""

    def __init__(
        self,
        model: TunedModel,
        dataset: ImageDataset,
        settings: TrainingConfig,
        seed: int,
        number: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._settings = settings
        self._seed = seed
        self._number = number
        self._device = device
        self._on_gpu = device.type == "cuda"
        placed(model.module, device)
        self._dtype = precision(settings.precision, device)
        parameters = list(model.trainable(number).values())
        if not parameters:
            raise TrainingFailed(f"adapter {model.spec.method} trains no tensor in round {number}")
        self._steps = Steps(optimizer_of(settings, parameters), self._dtype, device)
        self._micro = settings.batch_size
        self._losses = Losses(LOSS_STEPS if self._on_gpu else 1)
        self._orders = Orders(settings, len(dataset), seed)

    def run(self, progress: Callable[[Progress], None] | None, stop: Callable[[], bool] | None) -> TrainingResult:
        """Trains and returns what came of it."""
        steps = self._orders.steps
        start = self._model.state()
        self._model.train()
        began = reported = time.perf_counter()
        done = images = 0
        if progress is not None:
            progress(Progress(0, steps, math.nan, 0.0))
        with ExitStack() as until_the_end:
            until_the_end.enter_context(lowered(self._model.module, self._dtype))
            for batch in until_the_end.enter_context(closing(self._batches())):
                if not len(batch):
                    continue
                if stop is not None and stop():
                    raise TrainingFailed(f"training was stopped as asked, after {done} of {counted(steps, 'step')}")
                done += 1
                images += len(batch)
                self._losses.add(self._step(batch), len(batch), batch.last_pass)
                now = time.perf_counter()
                if progress is not None and (now - reported >= PROGRESS_S or batch.at == steps - 1):
                    reported = now
                    progress(Progress(done, steps, self._losses.look(), images / (now - began)))
        self._losses.look()
        seconds = time.perf_counter() - began
        if not done:
            raise DataInvalid(f"none of the {len(self._dataset)} images can be read")
        metrics = {
            **self._losses.metrics(),
            "seconds": seconds,
            "images_per_second": images / seconds,
            "steps": float(done),
            "skipped_images": float(len(self._dataset) - self._dataset.examples),
            "micro_batch": float(self._micro),
            "threads": float(torch.get_num_threads()),
        }
        facts = facts_of(self._device, self._dtype)
        return result_of(self._model, start, self._number, self._dataset.examples, metrics, facts)

    def _batches(self) -> Generator[_Ready]:
        """Yields every batch augmented; on a GPU by a thread, so that the GPU does not wait for it."""
        drawn = enumerate(self._dataset.batches(self._orders))
        if self._on_gpu:
            yield from ahead(drawn, lambda each: self._ready(*each))
        else:
            for position, batch in drawn:
                yield self._ready(position, batch)

    def _ready(self, position: int, batch: Batch) -> _Ready:
        epoch, last_pass = position // self._orders.a_pass, position >= self._orders.steps - self._orders.a_pass
        pixels = augment(batch.pixels, batch.rows, self._settings.augmentation, self._seed, epoch)
        images, labels = torch.from_numpy(pixels), batch.labels
        if self._on_gpu:
            images, labels = images.pin_memory(), labels.pin_memory()
        return _Ready(images, labels, last_pass, position)

    def _step(self, batch: _Ready) -> torch.Tensor:
        """Makes one optimizer step and returns its loss; halves the micro-batch until it fits."""
        images = batch.images.to(self._device, non_blocking=True)
        labels = batch.labels.to(self._device, non_blocking=True)
        generators = Generators.of(self._device)
        while True:
            if (loss := self._gradients(images, labels)) is None:
                self._smaller_micro_batch(len(batch))
            elif self._steps.take():
                return loss
            generators.restore()

    def _gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor | None:
        """Adds up the gradients of the batch's mean loss over micro-batches.

        Returns:
            That loss; None if a micro-batch does not fit into memory, with no gradient left.
        """
        total = torch.zeros((), device=self._device)
        try:
            for some, theirs in zip(torch.split(images, self._micro), torch.split(labels, self._micro), strict=True):
                inputs = self._dataset.preprocessing.normalise(some)
                if self._on_gpu:
                    inputs = inputs.contiguous(memory_format=torch.channels_last)
                with autocast(self._dtype, self._device):
                    logits = self._model.module(inputs)
                loss = functional.cross_entropy(logits.float(), theirs) * (len(some) / len(images))
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
                f"not even one image fits into the memory of {self._device}; take a smaller model or input"
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


def result_of(
    model: TunedModel, start: Arrays, number: int, examples: int, metrics: dict[str, float], facts: dict[str, str]
) -> TrainingResult:
    """Returns what training changed in round `number`.

    Args:
        model: As training left it.
        start: Its tuned tensors before.
        number: The round (1, 2, ...): it chooses each tensor's role.
        examples: The weight of the update.
        metrics: `TrainingResult.metrics`, steps among them.
        facts: `TrainingResult.facts`.

    Raises:
        TrainingFailed: If a trained tensor is not finite.
    """
    trained = model.state()
    delta, local = {}, {}
    for tensor in model.spec.tensors:
        role = tensor.role(number)
        if role is not TensorRole.FROZEN and not np.isfinite(trained[tensor.name]).all():
            raise TrainingFailed(
                f"tensor {tensor.name} is not finite after {counted(metrics['steps'], 'step')}; lower the learning rate"
            )
        if role is TensorRole.SENT:
            delta[tensor.name] = trained[tensor.name] - start[tensor.name]
        elif role is TensorRole.LOCAL:
            local[tensor.name] = trained[tensor.name]
    return TrainingResult(delta, local, examples, metrics, facts)


def facts_of(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Returns what a result depends on beside its inputs: torch's version, device and precision."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": str(dtype).removeprefix("torch."),
    }


class Losses:
    """Losses of steps, fetched from the device a few at a time, weighed by images."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._waiting: list[tuple[torch.Tensor, int, bool]] = []
        self._sum = 0.0
        self._images = 0
        self._count = 0
        self._first = self._last = math.nan

    def add(self, loss: torch.Tensor, images: int, last_pass: bool) -> None:
        """Takes the mean loss of a step over so many images."""
        self._waiting.append((loss, images, last_pass))
        if len(self._waiting) >= self._every:
            self.look()

    def look(self) -> float:
        """Fetches what is waiting and returns the last loss.

        Raises:
            TrainingFailed: If a loss is not finite.
        """
        values = torch.stack([loss for loss, _, _ in self._waiting]).tolist() if self._waiting else []
        for value, (_, images, last_pass) in zip(values, self._waiting, strict=True):
            self._count += 1
            if not math.isfinite(value):
                raise TrainingFailed(f"the loss is {value} in step {self._count}; lower the learning rate")
            if self._count == 1:
                self._first = value
            self._last = value
            if last_pass:
                self._sum += value * images
                self._images += images
        self._waiting.clear()
        return self._last

    def metrics(self) -> dict[str, float]:
        """Returns loss, loss_first, loss_last."""
        return {"loss": self._sum / self._images, "loss_first": self._first, "loss_last": self._last}


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
