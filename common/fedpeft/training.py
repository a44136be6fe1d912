"""Local training: one client's work in one round.

Notable:
- The optimizer is new in every call: no momentum passes from one client or round to another.
- The last, smaller batch is trained too, and an update weighs by the true number of images.
- A batch that does not fit into GPU memory is cut in halves whose gradients add up to the same step.
- On the CPU a repeat with the same seed and number of threads is bit-identical.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedpeft import seeds
from fedpeft.config import TrainingConfig
from fedpeft.data.dataset import Batch, ImageDataset
from fedpeft.data.transforms import augment
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.peft import TunedModel
from fedpeft.spec import Role
from fedpeft.units import counted

PROGRESS_S = 1.0
"""Seconds between two reports of progress, at least."""

LOSS_STEPS = 25
"""Steps on a GPU between two looks at the loss: each look waits for the GPU."""

_log = structlog.get_logger(__name__)

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is.

    Attributes:
        step: Optimizer steps done.
        steps: Optimizer steps in all.
        loss: Mean cross-entropy of the last step that was looked at.
        images_per_second: Mean rate since the beginning; of examples, where these are no images.
    """

    step: int
    steps: int
    loss: float
    images_per_second: float


@dataclass(frozen=True)
class TrainingResult:
    """What a client's round gave.

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
    compiled: bool = False,
) -> TrainingResult:
    """Trains the tuned tensors of round `number` from the values they have.

    Args:
        model: The model, its tensors those of the adapter version to start from; it ends trained, in evaluation mode.
        dataset: The client's images.
        settings: Epochs or steps, optimizer, precision, augmentation.
        seed: Seed of this training, see `fedpeft.seeds.training`. Torch's global generators are left as they were.
        number: The round (1, 2, ...): it chooses each tensor's role.
        device: Where to train.
        progress: Called about once a second and at the end.
        stop: Asked between steps; once true, training ends without a result.
        compiled: Run the model through torch.compile; on a GPU only. Compiling takes about a minute, so it pays for
            long rounds.

    Raises:
        DataInvalid: If no image can be read, or more than 1 % cannot.
        TrainingFailed: If `stop` asked for it, the loss or a tensor became infinite or NaN, or not even one image fits
            into the GPU's memory.
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        training = _Training(model, dataset, settings, seed, number, device, compiled)
        try:
            return training.run(progress, stop)
        finally:
            model.eval()


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """Returns the type in which a device computes when a run wants a precision.

    auto is bfloat16 on a GPU that has it in hardware and float32 elsewhere. A device that lacks the wanted type
    computes in float32, which is more exact.
    """
    cuda = device.type == "cuda"
    bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "float16":
        return torch.float16 if cuda else torch.float32
    if wanted == "bfloat16":
        return torch.bfloat16 if bfloat16 or device.type == "cpu" else torch.float32
    return torch.bfloat16 if wanted == "auto" and bfloat16 else torch.float32


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
        compiled: bool,
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._settings = settings
        self._seed = seed
        self._number = number
        self._device = device
        on_gpu = device.type == "cuda"
        model.module.to(device)
        if on_gpu:
            # The patch embedding's convolution is faster so; the values are the same.
            model.module.to(memory_format=torch.channels_last)
        self._forward: Callable[..., torch.Tensor] = model.module
        if compiled and on_gpu:
            self._forward = torch.compile(model.module)
        self._dtype = precision(settings.precision, device)
        self._scaler = torch.amp.GradScaler(device.type, enabled=self._dtype is torch.float16)
        parameters = list(model.trainable(number).values())
        if not parameters:
            raise TrainingFailed(f"adapter {model.spec.method} trains no tensor in round {number}")
        self._optimizer = optimizer_of(settings, parameters)
        self._micro = settings.batch_size
        self._losses = Losses(LOSS_STEPS if on_gpu else 1)

    def run(self, progress: Callable[[Progress], None] | None, stop: Callable[[], bool] | None) -> TrainingResult:
        """Trains and returns what came of it."""
        orders = Orders(self._settings, len(self._dataset), self._seed)
        steps = orders.steps
        start = self._model.state()
        self._model.train()
        began = reported = time.perf_counter()
        done = images = 0
        for position, batch in enumerate(self._dataset.batches(orders)):
            if not len(batch):
                continue
            if stop is not None and stop():
                raise TrainingFailed(f"training was stopped as asked, after {done} of {counted(steps, 'step')}")
            done += 1
            images += len(batch)
            self._losses.add(
                self._step(batch, position // orders.a_pass), len(batch), position >= steps - orders.a_pass
            )
            now = time.perf_counter()
            if progress is not None and (now - reported >= PROGRESS_S or position == steps - 1):
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

    def _step(self, batch: Batch, epoch: int) -> torch.Tensor:
        """Makes one optimizer step and returns its loss; halves the micro-batch until it fits."""
        pixels = augment(batch.pixels, batch.rows, self._settings.augmentation, self._seed, epoch)
        images, labels = torch.from_numpy(pixels), batch.labels
        if self._device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images = images.to(self._device, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        random = _random_state(self._device)
        while True:
            try:
                loss = self._gradients(images, labels)
                break
            except torch.OutOfMemoryError:
                self._optimizer.zero_grad(set_to_none=True)
            # Outside the handler: while it runs, the exception holds the tensors that filled the memory.
            self._smaller_micro_batch(len(batch))
            _set_random_state(self._device, random)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _gradients(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Adds up the gradients of the batch's mean loss over micro-batches, and returns that loss."""
        total = torch.zeros((), device=self._device)
        for some, theirs in zip(torch.split(images, self._micro), torch.split(labels, self._micro), strict=True):
            inputs = self._dataset.preprocessing.normalise(some)
            if self._device.type == "cuda":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                logits = self._forward(inputs)
            loss = functional.cross_entropy(logits.float(), theirs) * (len(some) / len(images))
            self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _autocast(self) -> Any:
        if self._dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def _smaller_micro_batch(self, batch: int) -> None:
        held = min(self._micro, batch)
        if held <= 1:
            raise TrainingFailed(
                f"not even one image fits into the memory of {self._device}; take a smaller model or input"
            )
        self._micro = -(-held // 2)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning(
            "out_of_gpu_memory", images=held, micro_batch=self._micro, effect="gradients add up to the same step"
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
        if role is not Role.FROZEN and not np.isfinite(trained[tensor.name]).all():
            raise TrainingFailed(
                f"tensor {tensor.name} is not finite after {counted(metrics['steps'], 'step')}; lower the learning rate"
            )
        if role is Role.SENT:
            delta[tensor.name] = trained[tensor.name] - start[tensor.name]
        elif role is Role.LOCAL:
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


class Orders:
    """The positions of every batch, a new order in each pass; made as they are asked for, as often as wanted.

    Attributes:
        steps: Batches in all.
        a_pass: Batches in one pass over the data.
    """

    def __init__(self, settings: TrainingConfig, images: int, seed: int) -> None:
        self._images, self._size, self._seed = images, settings.batch_size, seed
        self.a_pass = math.ceil(images / settings.batch_size)
        self.steps = settings.steps or (settings.epochs or 1) * self.a_pass

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        order = np.empty(0, np.int64)
        for step in range(self.steps):
            epoch, at = step // self.a_pass, step % self.a_pass * self._size
            if at == 0:
                generator = np.random.Generator(np.random.PCG64(seeds.derive(self._seed, "shuffle", epoch)))
                order = generator.permutation(self._images)
            yield order[at : at + self._size]


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


def _random_state(device: torch.device) -> Mapping[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(device: torch.device, state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
