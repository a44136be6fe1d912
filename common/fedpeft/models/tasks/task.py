"""Interface of a task: how a model is built, its data read, its loss and its scores made.

FedPEFT owns the one training loop and the one evaluation (`fedpeft.training`): precision, micro-batches, progress and
preparing batches ahead are the same for every task. docs/extending.md has a whole task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedpeft.config import ModelConfig, TrainingConfig
from fedpeft.data.examples import Examples
from fedpeft.data.labels import map_labels
from fedpeft.data.reading import USUAL, Reading
from fedpeft.data.transforms import ImageInputs, RunModel
from fedpeft.errors import ModelInvalid, SettingsInvalid
from fedpeft.models.halves import Halves
from fedpeft.models.structure import ModelStructure, State
from fedpeft.models.tasks.scores import ClassScores, MeanLoss, Scores

Batch = Mapping[str, torch.Tensor]
"""Tensors of a batch by name, [n, ...] each, with the same n."""
LabelMap = Mapping[str, str | None]
"""A site's class names to the run's; None drops a class."""


class Source(Protocol):
    """A site's data as they lie there."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The site's own class names."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every row."""
        ...

    def __len__(self) -> int: ...


class Dataset(Protocol):
    """A site's data as a run's model takes them, with the run's labels; `Examples` is one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The run's classes."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every row, a position in `classes`."""
        ...

    @property
    def examples(self) -> int:
        """Rows that can be read, as far as is known: the weight of an update."""
        ...

    def __len__(self) -> int: ...

    def batches(self, orders: Iterable[NDArray[np.int64]]) -> Iterator[Any]:
        """Yields the rows at each array of positions, as `Task.collate` takes them; unreadable ones are left out."""
        ...


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a training over the data.

    Attributes:
        settings: `[training]`.
        seed: Seed of the training.
        number: The pass, from 0.
    """

    settings: TrainingConfig
    seed: int
    number: int


class Task(ABC):
    """The use of a model. One object of a class is made without arguments; it keeps no state.

    `module`, `structure`, `read` and `loss` must be written; the rest has a default. Torch's global generators are
    seeded before `module` and every training, and put back after.
    """

    example: ClassVar[str] = "example"
    """The word for one row of data, in messages."""

    @abstractmethod
    def module(self, config: ModelConfig) -> nn.Module:
        """Returns the model that a run names, with random values, on torch's default device.

        Args:
            config: `[model]`; its `variant` is what stands behind the colon of `name`, `options` that table of a run.

        Raises:
            ModelInvalid: If there is no such model, or an option is wrong.
        """

    @abstractmethod
    def structure(self, module: nn.Module, config: ModelConfig) -> ModelStructure:
        """Returns where the head is and the blocks are that PEFT methods attach to, if any."""

    def halves(self, module: nn.Module, config: ModelConfig, parts: int) -> Halves | None:
        """Returns a model in two, for runs that keep features; None, as here, if it cannot be divided so.

        Where it can, `loss` and `predict` are called with the back in the place of the model and with what the front
        makes of `values` in the place of those; rows are collated as in evaluation.

        Args:
            module: The model, tuned or not, on any device.
            config: `[model]`.
            parts: Parts that the front ends behind, at least 1; see `ModelStructure.parts_before`.
        """
        return None

    def pretrained(self, config: ModelConfig) -> State:
        """Returns the tensors that `weights = "hub"` stands for.

        Raises:
            ModelInvalid: If they cannot be had; here always.
        """
        text = f'"hub" is timm\'s; {config.name!r} takes "none" or a weights file'
        raise ModelInvalid(f"model.weights: {text}", (("model.weights", text),))

    def convert(self, checkpoint: State, module: nn.Module, config: ModelConfig) -> State:
        """Returns a checkpoint's tensors under the names and in the shapes of `module`, and no others."""
        return checkpoint

    def images(self, module: nn.Module, config: ModelConfig) -> ImageInputs | None:
        """Returns the images that a model takes; None if it takes something else."""
        return None

    def reading(self, options: Reading) -> Self:
        """Returns the task with a site's options for reading images.

        Raises:
            SettingsInvalid: If there are any, and the data are no images.
        """
        if options != USUAL:
            raise SettingsInvalid(f"columns and pixels are of images; {type(self).__name__} reads other data")
        return self

    @abstractmethod
    def read(self, path: Path) -> Any:
        """Opens a site's data, whatever the run: `Examples`, or another `Source`.

        Raises:
            DataInvalid: If there is nothing there that can be read.
        """

    def select(self, source: Any, rows: NDArray[np.int64]) -> Any:
        """Returns some rows of a source."""
        return source.select(rows)

    def dataset(self, source: Any, model: RunModel, label_map: LabelMap, cache_bytes: int | None = None) -> Any:
        """Returns a source as a `Dataset` of a run.

        Args:
            source: From `read`.
            model: The run's backbone; `model.config` is its `[model]`, options included.
            label_map: The site's.
            cache_bytes: Size up to which decoded data are kept; the task's own limit if None.

        Raises:
            DataInvalid: If its classes are not the run's.
        """
        classes = model.config.classes
        mapped = map_labels(source.class_names, source.labels, classes, label_map)
        return Examples(source.values[mapped.rows], mapped.labels, classes)

    def collate(self, rows: Any, training: Pass | None) -> Batch:
        """Returns rows of a `Dataset` as a batch on the CPU; in training a thread may do so ahead of the steps.

        Args:
            rows: From `Dataset.batches`.
            training: The pass that they are of, for an augmentation that derives from its seed; None in evaluation.
        """
        return {"values": torch.from_numpy(rows.values), "labels": torch.from_numpy(rows.labels)}

    def transform(self, batch: Batch, data: Any) -> Batch:
        """Returns a batch, or a part of one, as `loss` and `predict` take it; it is on their device by now."""
        return batch

    @abstractmethod
    def loss(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns the loss of each example, [n]; what is minimised is their mean."""

    def predict(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns what the scores are made of, [n, ...], a row for each example; here the losses."""
        return self.loss(module, batch)

    def scores(self, data: Any) -> Scores:
        """Returns new scores, which take the predictions of all batches of a data set; here the mean loss."""
        return MeanLoss()


class Classification(Task):
    """A task of labelled examples: cross entropy, and accuracy by class."""

    def predict(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Returns logits, float[n, classes]; here of the batch's values as they are."""
        logits: torch.Tensor = module(batch["values"])
        return logits

    def loss(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """See `Task.loss`."""
        return functional.cross_entropy(self.predict(module, batch).float(), batch["labels"], reduction="none")

    def scores(self, data: Any) -> Scores:
        """See `Task.scores`."""
        return ClassScores(data.classes)
