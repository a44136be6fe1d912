"""Evaluation: accuracy and loss of a model on held-out images, in all and by class."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from torch.nn import functional

from fedpeft.data.dataset import ImageDataset
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.peft import TunedModel
from fedpeft.training.loop import placed
from fedpeft.training.precision import autocast, lowered, multiplying, precision

MAX_CLASS_FIGURES = 2000
"""Classes of which figures are returned, the first ones: a message holds 2,048 figures."""

MAX_NAME_BYTES = 128
"""Longest name of a figure."""


def evaluate(
    model: TunedModel,
    dataset: ImageDataset,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    wanted: str = "float32",
) -> dict[str, float]:
    """Scores a model without augmentation, in the data set's order.

    Args:
        model: The model; it ends in evaluation mode on `device`.
        dataset: Held-out images.
        batch_size: Images at a time; halved where GPU memory does not hold them.
        device: Where to compute.
        wanted: The precision that a run wants, see `fedpeft.training.precision.precision`: it is scored in what it
            trains in.

    Returns:
        accuracy (0..1), loss (mean cross-entropy), examples, skipped_images (unreadable ones), and accuracy/CLASS for
        each of the run's classes that has examples.

    Raises:
        DataInvalid: If no image can be read, or more than 1 % cannot.
        TrainingFailed: If not even one image fits into the GPU's memory.
    """
    device = torch.device(device)
    placed(model.module, device)
    model.eval()
    dtype = precision(wanted, device)
    tally = _Tally(dataset.classes)
    order = np.arange(len(dataset))
    with multiplying(wanted, device), lowered(model.module, dtype):
        for batch in dataset.batches([order[at : at + batch_size] for at in range(0, len(order), batch_size)]):
            if len(batch):
                tally.add(_logits(model, dataset, torch.from_numpy(batch.pixels), device, dtype), batch.labels)
    if not tally.examples:
        raise DataInvalid(f"none of the {len(dataset)} images can be read")
    return tally.figures() | {"skipped_images": float(len(dataset) - tally.examples)}


def scores(logits: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> dict[str, float]:
    """Scores a classifier of any kind.

    Args:
        logits: Float [n, classes].
        labels: Positions in `classes`, int64[n].
        classes: The run's class names.

    Returns:
        accuracy (0..1), loss (mean cross-entropy), examples, and accuracy/CLASS for each class that has examples.
    """
    tally = _Tally(classes)
    tally.add(logits.double().cpu(), labels.cpu())
    return tally.figures()


class _Tally:
    """Correct predictions and the loss so far, by class."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._right, self._seen = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64)
        self._loss = 0.0

    @property
    def examples(self) -> int:
        return int(self._seen.sum())

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Takes logits on the CPU, float64[n, classes], and their labels, int64[n]."""
        count = len(self._classes)
        self._loss += functional.cross_entropy(logits, labels, reduction="sum").item()
        hit = (logits.argmax(1) == labels).numpy()
        self._seen += np.bincount(labels.numpy(), minlength=count)
        self._right += np.bincount(labels.numpy()[hit], minlength=count)

    def figures(self) -> dict[str, float]:
        figures = {
            "accuracy": float(self._right.sum() / self.examples),
            "loss": self._loss / self.examples,
            "examples": float(self.examples),
        }
        for k in np.flatnonzero(self._seen)[:MAX_CLASS_FIGURES]:
            figures[_figure(self._classes[k])] = float(self._right[k] / self._seen[k])
        return figures


@torch.inference_mode()
def _logits(
    model: TunedModel, dataset: ImageDataset, pixels: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Returns logits on the CPU, float64[n, classes]; halves the batch until it fits."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    size = len(pixels)
    while True:
        try:
            parts = []
            for some in torch.split(pixels, size):
                inputs = dataset.preprocessing.normalise(some.to(device)).contiguous(memory_format=layout)
                with autocast(dtype, device):
                    parts.append(model.module(inputs).double())
            return torch.cat(parts).cpu()
        except torch.OutOfMemoryError:
            if size == 1:
                raise TrainingFailed(f"not even one image fits into the memory of {device}") from None
        # Outside the handler: while it runs, the exception holds the tensors that filled the memory.
        size = -(-size // 2)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _figure(name: str) -> str:
    """Returns accuracy/CLASS, a long class name cut and made distinct by its digest."""
    figure = f"accuracy/{name}"
    if len(figure.encode()) <= MAX_NAME_BYTES:
        return figure
    digest = sha256(name.encode()).hexdigest()[:12]
    return figure.encode()[: MAX_NAME_BYTES - 13].decode(errors="ignore") + "~" + digest
