"""Evaluation: the scores of a model on held-out data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fedpeft.errors import DataInvalid
from fedpeft.models.tasks import Batch, Dataset, Task
from fedpeft.peft import TunedModel
from fedpeft.training.batches import in_parts
from fedpeft.training.loop import placed
from fedpeft.training.precision import autocast, lowered, multiplying, precision


def evaluate(
    task: Task,
    model: TunedModel,
    dataset: Dataset,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    wanted: str = "float32",
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Scores a model without augmentation, in the data set's order.

    Args:
        task: The model's.
        model: The model; it ends in evaluation mode on `device`.
        dataset: Held-out data.
        batch_size: Examples at a time; halved where GPU memory does not hold them.
        device: Device of the computation.
        wanted: The precision that a run wants, see `fedpeft.training.precision.precision`: it is scored in what it
            trains in.
        progress: Called after each batch with the number of examples that are scored.

    Returns:
        The figures of `Task.scores`: of a classification accuracy (0..1), loss (mean cross-entropy), examples, and
        accuracy/CLASS for each of the run's classes that has examples. Beside them skipped_images (unreadable ones).

    Raises:
        DataInvalid: If no example can be read, or more than 1 % cannot.
        TrainingFailed: If not even one example fits into the GPU's memory.
    """
    device = torch.device(device)
    placed(model.module, device)
    model.eval()
    dtype = precision(wanted, device)
    scores, examples, order = task.scores(dataset), 0, np.arange(len(dataset))
    with multiplying(wanted, device), lowered(model.module, dtype):
        for rows in dataset.batches([order[at : at + batch_size] for at in range(0, len(order), batch_size)]):
            if len(rows):
                batch = task.collate(rows, None)
                scores.add(_predicted(task, model, dataset, batch, device, dtype), batch)
                examples += len(rows)
            if progress is not None:
                progress(examples)
    if not examples:
        raise DataInvalid(f"none of the {len(dataset)} {task.example}s can be read")
    return scores.figures() | {"skipped_images": float(len(dataset) - examples)}


@torch.inference_mode()
def _predicted(
    task: Task, model: TunedModel, dataset: Dataset, batch: Batch, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Returns predictions on the CPU, float64[n, ...]."""

    def predict(part: Batch) -> torch.Tensor:
        inputs = task.transform(part, dataset)
        with autocast(dtype, device):
            return task.predict(model.module, inputs).double()

    return torch.cat(in_parts(batch, device, predict, task.example)).cpu()
