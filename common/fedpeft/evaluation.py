"""Evaluation: accuracy and loss of a model on held-out images, in all and by class."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch
from torch.nn import functional

from fedpeft.data.dataset import ImageDataset
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.peft import TunedModel

MAX_CLASS_FIGURES = 2000
"""Classes of which figures are returned, the first ones: a message holds 2,048 figures."""

MAX_NAME_BYTES = 128
"""Longest name of a figure."""


def evaluate(
    model: TunedModel, dataset: ImageDataset, batch_size: int = 256, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Scores a model in float32, without augmentation, in the data set's order.

    Args:
        model: The model; it ends in evaluation mode on `device`.
        dataset: Held-out images.
        batch_size: Images at a time; halved where GPU memory does not hold them.
        device: Where to compute.

    Returns:
        accuracy (0..1), loss (mean cross-entropy), examples, skipped_images (unreadable ones), and accuracy/CLASS for
        each of the run's classes that has examples.

    Raises:
        DataInvalid: If no image can be read, or more than 1 % cannot.
        TrainingFailed: If not even one image fits into the GPU's memory.
    """
    device = torch.device(device)
    model.module.to(device)
    model.eval()
    classes = len(dataset.classes)
    right, seen, loss = np.zeros(classes, np.int64), np.zeros(classes, np.int64), 0.0
    order = np.arange(len(dataset))
    for batch in dataset.batches([order[at : at + batch_size] for at in range(0, len(order), batch_size)]):
        if not len(batch):
            continue
        logits = _logits(model, dataset, torch.from_numpy(batch.pixels), device)
        loss += functional.cross_entropy(logits, batch.labels, reduction="sum").item()
        labels = batch.labels.numpy()
        seen += np.bincount(labels, minlength=classes)
        right += np.bincount(labels[logits.argmax(1).numpy() == labels], minlength=classes)
    examples = int(seen.sum())
    if not examples:
        raise DataInvalid(f"none of the {len(dataset)} images can be read")
    figures = {
        "accuracy": float(right.sum() / examples),
        "loss": loss / examples,
        "examples": float(examples),
        "skipped_images": float(len(dataset) - examples),
    }
    for k in np.flatnonzero(seen)[:MAX_CLASS_FIGURES]:
        figures[_figure(dataset.classes[k])] = float(right[k] / seen[k])
    return figures


@torch.inference_mode()
def _logits(model: TunedModel, dataset: ImageDataset, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns logits on the CPU, float64[n, classes]; halves the batch until it fits."""
    size = len(pixels)
    while True:
        try:
            parts = [
                model.module(dataset.preprocessing.normalise(some.to(device))).double().cpu()
                for some in torch.split(pixels, size)
            ]
            return torch.cat(parts)
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
