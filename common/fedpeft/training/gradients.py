"""Gradients of one client's batches, in micro-batches where a batch does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import structlog
import torch
from torch import nn
from torch.nn import functional

from fedpeft.errors import TrainingFailed
from fedpeft.models.tasks import Batch, Dataset, Task
from fedpeft.peft import TunedModel
from fedpeft.training.batches import size, split
from fedpeft.training.precision import Steps, autocast
from fedpeft.training.randomness import Generators

Loss = Callable[[Batch], torch.Tensor]
"""Losses of the examples of a transformed batch, [n], with some client's tensors."""

_log = structlog.get_logger(__name__)


class TaskLoss(nn.Module):
    """A task's loss as a module, so that `functional_call` can replace tensors of `module` for a call.

    Args:
        task: The model's.
        module: The model; its parameters are here under `module.` and their own names.
    """

    def __init__(self, task: Task, module: nn.Module) -> None:
        super().__init__()
        self._task = task
        self.module = module

    def forward(self, batch: Batch) -> torch.Tensor:
        """Returns the losses of the examples of a transformed batch, [n]."""
        return self._task.loss(self.module, batch)


class Trained(Protocol):
    """One client's training, as far as its gradients need it.

    Attributes:
        dataset: Its data.
        optimizer_steps: Its optimizer, whose parameters get the gradients.
        micro: Most examples that go through the model at once.
    """

    dataset: Dataset
    optimizer_steps: Steps
    micro: int


class Gradients:
    """Computes gradients of mean losses.

    Args:
        task: The model's.
        model: The model.
        dtype: In which the forward pass computes.
        device: Device of the computation.
    """

    def __init__(self, task: Task, model: TunedModel, dtype: torch.dtype, device: torch.device) -> None:
        self._task = task
        self._model = model
        self._dtype = dtype
        self._device = device

    def compute(self, training: Trained, batch: Batch, loss: Loss) -> torch.Tensor:
        """Leaves the gradients of a batch's mean loss at the parameters; returns that loss.

        Halves the micro-batch until it fits; torch's generators then begin again where they were.
        """
        generators = Generators.of(self._device)
        while (found := self._added_up(training, batch, loss)) is None:
            self._smaller_micro_batch(training, size(batch))
            generators.restore()
        return found

    def _added_up(self, training: Trained, batch: Batch, loss: Loss) -> torch.Tensor | None:
        """Adds up gradients over micro-batches.

        Returns:
            The mean loss; None if a micro-batch does not fit into memory, with no gradient left.
        """
        total = torch.zeros((), device=self._device)
        try:
            for part in split(batch, training.micro):
                inputs = self._task.transform(part, training.dataset)
                with autocast(self._dtype, self._device):
                    losses = loss(inputs)
                mean = mean_loss(losses, size(part), self._task) * (size(part) / size(batch))
                training.optimizer_steps.backward(mean)
                total += mean.detach()
            return total
        except torch.OutOfMemoryError:
            training.optimizer_steps.clear()
        return None  # outside the handler: while it runs, the exception holds the tensors that filled the memory

    def _smaller_micro_batch(self, training: Trained, batch: int) -> None:
        held = min(training.micro, batch)
        if held > 1:
            training.micro = -(-held // 2)
        elif not self._model.checkpoint():
            raise TrainingFailed(
                f"not even one {self._task.example} fits into the memory of {self._device}; take a smaller model or "
                "input"
            )
        drops = any(isinstance(part, nn.Dropout) and part.p and part.training for part in self._model.module.modules())
        effect = "gradients add up to the batch's" + (", with other draws of dropout" if drops else "")
        out_of_memory(self._device, training.micro, effect, images=held, checkpointing=self._model.checkpointing)


def out_of_memory(device: torch.device, micro: int, effect: str, **figures: Any) -> None:
    """Frees what a GPU holds for a batch that did not fit, and logs what follows."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _log.warning("out_of_gpu_memory", micro_batch=micro, effect=effect, **figures)


def mean_loss(losses: torch.Tensor, examples: int, task: Task) -> torch.Tensor:
    """Returns the mean of a batch's losses, added up in the order of torch's own mean cross entropy: to its bits."""
    if losses.shape != (examples,):
        raise TrainingFailed(
            f"{type(task).__name__}.loss returned {tuple(losses.shape)}; a loss for each of {examples} is needed"
        )
    only = torch.zeros(examples, dtype=torch.int64, device=losses.device)
    return functional.nll_loss(-losses.float().unsqueeze(1), only)
