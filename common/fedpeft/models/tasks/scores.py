"""Figures of a model on held-out data, added up from its predictions batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

MAX_CLASS_FIGURES = 2000
"""Classes of which figures are returned, the first ones: a message holds 2,048 figures."""

MAX_NAME_BYTES = 128
"""Longest name of a figure."""


class Scores(Protocol):
    """Adds up predictions to figures by name; `accuracy` (0 to 1) and `loss` are shown as such."""

    def add(self, predicted: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        """Takes the predictions of a batch, float64[n, ...] on the CPU, and the batch as it was collated."""

    def figures(self) -> dict[str, float]:
        """Returns the figures of all that was added, at least one example."""
        ...


class MeanLoss:
    """The mean of losses, and the number of examples."""

    def __init__(self) -> None:
        self._sum, self._examples = 0.0, 0

    def add(self, predicted: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        """Takes losses, float64[n]."""
        self._sum += predicted.sum().item()
        self._examples += len(predicted)

    def figures(self) -> dict[str, float]:
        """See `Scores.figures`."""
        return {"loss": self._sum / self._examples, "examples": float(self._examples)}


class ClassScores:
    """Accuracy (0 to 1), in all and of each class that has examples, mean cross entropy, and the number of examples.

    Args:
        classes: The run's.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._classes = classes
        self._right, self._seen = np.zeros(len(classes), np.int64), np.zeros(len(classes), np.int64)
        self._loss = 0.0

    def add(self, predicted: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> None:
        """Takes logits, float64[n, classes], and their labels, int64[n]."""
        labels, count = batch["labels"], len(self._classes)
        self._loss += functional.cross_entropy(predicted, labels, reduction="sum").item()
        hit = (predicted.argmax(1) == labels).numpy()
        self._seen += np.bincount(labels.numpy(), minlength=count)
        self._right += np.bincount(labels.numpy()[hit], minlength=count)

    def figures(self) -> dict[str, float]:
        """See `Scores.figures`."""
        examples = int(self._seen.sum())
        figures = {
            "accuracy": float(self._right.sum() / examples),
            "loss": self._loss / examples,
            "examples": float(examples),
        }
        for k in np.flatnonzero(self._seen)[:MAX_CLASS_FIGURES]:
            figures[_figure(self._classes[k])] = float(self._right[k] / self._seen[k])
        return figures


def _figure(name: str) -> str:
    """Returns accuracy/CLASS, a long class name cut and made distinct by its digest."""
    figure = f"accuracy/{name}"
    if len(figure.encode()) <= MAX_NAME_BYTES:
        return figure
    digest = sha256(name.encode()).hexdigest()[:12]
    return figure.encode()[: MAX_NAME_BYTES - 13].decode(errors="ignore") + "~" + digest
