"""A task over a model in two, and the features of a data set that it takes in the place of the data.

What is kept stands in the place of the data set, and this task in the place of the run's. So training, evaluation and
passes of several clients are the same code with and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import ModelConfig
from fedpeft.models.halves import Halves
from fedpeft.models.structure import ModelStructure
from fedpeft.models.tasks import Batch, Dataset, Pass, Scores, Task
from fedpeft.training.batches import size
from fedpeft.training.precision import autocast


@dataclass(frozen=True)
class KeptRows:
    """Rows of kept features.

    Attributes:
        batch: As a transformed batch, features in the place of the values.
    """

    batch: Batch

    def __len__(self) -> int:
        return size(self.batch) if self.batch else 0


class KeptFeatures:
    """A data set whose features are kept; the places of unreadable rows stay empty, as in the data set itself.

    Args:
        dataset: The data set.
        batch: Transformed batch of all rows, on the CPU; that of an unreadable one is anything.
        is_readable: For each row, bool[n].
    """

    def __init__(self, dataset: Dataset, batch: Batch, is_readable: NDArray[np.bool_]) -> None:
        self.classes = dataset.classes
        self.labels = dataset.labels
        self._batch = batch
        self._is_readable = is_readable

    @property
    def examples(self) -> int:
        """See `Dataset.examples`."""
        return int(self._is_readable.sum())

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(tensor.nbytes for tensor in self._batch.values())

    def __len__(self) -> int:
        return len(self._is_readable)

    def batches(self, orders: Iterable[NDArray[np.int64]]) -> Iterator[KeptRows]:
        """See `Dataset.batches`."""
        for order in orders:
            rows = torch.from_numpy(order[self._is_readable[order]])
            yield KeptRows({name: tensor[rows] for name, tensor in self._batch.items()} if len(rows) else {})


class DividedTask(Task):
    """A run's task over a model in two: takes kept features, or computes those of a batch.

    Args:
        task: The run's.
        halves: The model.
        dtype: In which the model computes.
        device: Device of the computation.
    """

    def __init__(self, task: Task, halves: Halves, dtype: torch.dtype, device: torch.device) -> None:
        self._task = task
        self._halves = halves
        self._dtype = dtype
        self._device = device
        self.example = task.example  # type: ignore[misc]  # the word of the run's task

    def module(self, config: ModelConfig) -> nn.Module:
        """See `Task.module`."""
        return self._task.module(config)

    def structure(self, module: nn.Module, config: ModelConfig) -> ModelStructure:
        """See `Task.structure`."""
        return self._task.structure(module, config)

    def read(self, path: Path) -> Any:
        """See `Task.read`."""
        return self._task.read(path)

    def collate(self, rows: Any, training: Pass | None) -> Batch:
        """Returns kept rows as they are, and others as the run's task does in evaluation."""
        return rows.batch if isinstance(rows, KeptRows) else self._task.collate(rows, None)

    def transform(self, batch: Batch, data: Any) -> Batch:
        """Returns a batch with features as its values."""
        if isinstance(data, KeptFeatures):
            return batch
        inputs = self._task.transform(batch, data)
        with torch.no_grad(), autocast(self._dtype, self._device):
            return {**inputs, "values": self._halves.front(inputs["values"])}

    def loss(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """See `Task.loss`; `module` is the one that was divided."""
        return self._task.loss(self._halves.back, batch)

    def predict(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """See `Task.predict`; `module` is the one that was divided."""
        return self._task.predict(self._halves.back, batch)

    def scores(self, data: Any) -> Scores:
        """See `Task.scores`."""
        return self._task.scores(data)
