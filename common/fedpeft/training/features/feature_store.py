"""Features of a run's examples, computed once and kept: what a model makes of them before its first tuned tensor.

Notable:
- Features are computed in the order of the data set, in batches of `[training] batch_size`. So they have the same bits
  whichever round, process or resumed simulation computes them, and which of them are kept changes no bit.
- Features belong to a name that the owner of the data gives, as a client's: a loaded run has one backbone, one way to
  read images and one place where the model is divided, and a name's data are the same throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import RunConfig
from fedpeft.errors import TrainingFailed
from fedpeft.models.halves import Halves
from fedpeft.models.tasks import Batch, Dataset, Task
from fedpeft.training.batches import in_parts, size
from fedpeft.training.features.divided_task import DividedTask, KeptFeatures
from fedpeft.training.loop import placed
from fedpeft.training.precision import lowered, multiplying, precision

LIMIT_BYTES = 1024**3
"""Features that a loaded run keeps of all names together, and the most of one data set, in this machine's memory."""

_log = structlog.get_logger(__name__)


class FeatureStore:
    """The features that a loaded run keeps.

    Args:
        config: The run file.
        task: The run's.
        module: The tuned model.
        halves: The model in two.
        device: Device of the computation.
        limit_bytes: Most features that are kept.

    Attributes:
        task: The task that trains and scores the data sets of this store, and others of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        module: nn.Module,
        halves: Halves,
        device: torch.device,
        limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        self._settings = config.training
        self._module = module
        self._device = device
        self._dtype = precision(config.training.precision, device)
        self._limit_bytes = limit_bytes
        self._kept: dict[str, KeptFeatures] = {}
        self._held_bytes = 0
        self._told = set[str]()
        self.task = DividedTask(task, halves, self._dtype, device)

    def of(
        self,
        name: str,
        opened: Callable[[], Dataset],
        stop: Callable[[], bool] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Dataset:
        """Returns the features of a data set; the data set itself if they alone are more than the limit.

        Args:
            name: Name of the data, which are the same at every call.
            opened: Returns the data set; not called where its features are kept.
            stop: Asked between batches; once true, computing ends.
            progress: Called after each batch with the number of examples that are done.

        Raises:
            DataInvalid: If too many rows cannot be read.
            TrainingFailed: If `stop` asked for it, or not even one example fits into the GPU's memory.
        """
        if name in self._kept:
            return self._kept[name]
        dataset = opened()
        features = self._computed(dataset, stop or (lambda: False), progress or (lambda _: None))
        if features is None:
            return dataset
        if self._held_bytes + features.nbytes <= self._limit_bytes:
            self._kept[name] = features
            self._held_bytes += features.nbytes
        else:
            self._tell("features of further data are computed anew in each round", kept_bytes=self._held_bytes)
        return features

    def _computed(
        self, dataset: Dataset, stop: Callable[[], bool], progress: Callable[[int], object]
    ) -> KeptFeatures | None:
        """Returns the features of a data set, None if they are too many."""
        count, step = len(dataset), self._settings.batch_size
        positions = [np.arange(at, min(at + step, count)) for at in range(0, count, step)]
        batch: dict[str, torch.Tensor] = {}
        is_readable = np.zeros(count, np.bool_)
        placed(self._module, self._device)
        with multiplying(self._settings.precision, self._device), lowered(self._module, self._dtype):
            for some, rows in zip(positions, dataset.batches(positions), strict=True):
                if stop():
                    raise TrainingFailed("training was stopped as asked, before its first step")
                good = some if len(rows) == len(some) else _readable(dataset, some)
                if not len(good):
                    continue
                part = self._transformed(rows, dataset)
                if not batch and (needed := count * _bytes_each(part)) > self._limit_bytes:
                    self._tell("features are not kept: too many", examples=count, bytes=needed)
                    return None
                batch = batch or {name: t.new_empty((count, *t.shape[1:])) for name, t in part.items()}
                is_readable[good] = True
                for name, tensor in part.items():
                    batch[name][torch.from_numpy(good)] = tensor
                progress(int(some[-1]) + 1)
        return KeptFeatures(dataset, batch, is_readable)

    @torch.no_grad()
    def _transformed(self, rows: Any, dataset: Dataset) -> Batch:
        """Returns rows as a transformed batch on the CPU."""

        def compute(part: Batch) -> dict[str, torch.Tensor]:
            return {name: tensor.cpu() for name, tensor in self.task.transform(part, dataset).items()}

        parts = in_parts(self.task.collate(rows, None), self._device, compute, self.task.example)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _tell(self, event: str, **figures: int) -> None:
        """Logs an event, the first time."""
        if event not in self._told:
            self._told.add(event)
            _log.warning(event, field="training.keep_features", limit_bytes=self._limit_bytes, **figures)


def _readable(dataset: Dataset, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the positions whose rows can be read: a data set leaves the others out of its batches."""
    single = [positions[at : at + 1] for at in range(len(positions))]
    good = [len(rows) > 0 for rows in dataset.batches(single)]
    return positions[np.array(good, np.bool_)]


def _bytes_each(batch: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in batch.values()) // size(batch)
