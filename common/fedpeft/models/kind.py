"""Kinds of models beside timm's image classifiers: one class each, from a package that is installed here.

A run names a kind before a colon in `model.name`, as in `text:tiny`, and a site's data likewise, as in
`--data text:letters/`. The class is found under the entry point group `fedpeft.kinds` of the packages that are
installed on this machine, and nowhere else: a run brings a name and never code. docs/extending.md has a whole kind.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import UNLABELLED, ModelConfig, TrainingConfig
from fedpeft.errors import DataInvalid, ModelInvalid
from fedpeft.models.families import Anatomy

__all__ = ["GROUP", "Anatomy", "Examples", "Kind", "Task", "installed", "kind_of"]

GROUP = "fedpeft.kinds"
"""The entry point group under which a package names its kinds."""


@dataclass(frozen=True)
class Examples:
    """Labelled examples: a site's, a part of them, or a batch.

    Attributes:
        values: One a row: [n, ...] of whatever dtype the kind reads.
        labels: Positions in `class_names`, int64[n].
        class_names: The site's own as `Kind.read` returns them; the run's, in its order, in training and evaluation.

    Raises:
        DataInvalid: If there is not one label in range for each value, or there are none.
    """

    values: NDArray[Any] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.labels) or len(self.values) != len(self.labels):
            raise DataInvalid(f"{len(self.values)} examples with {len(self.labels)} labels; one for each is needed")
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise DataInvalid(f"a label is not a position in the {len(self.class_names)} class names")

    @classmethod
    def unlabelled(cls, values: NDArray[Any]) -> Examples:
        """Returns examples of a kind without classes: all are of the one class that its run files then have."""
        return cls(values, np.zeros(len(values), np.int64), (UNLABELLED,))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[np.int64]) -> Examples:
        """Returns some of the examples, in the order of `rows`."""
        return Examples(self.values[rows], self.labels[rows], self.class_names)


@dataclass(frozen=True)
class Task:
    """One client's training in one round.

    Attributes:
        module: The model from `Kind.module` with what the PEFT method injected, in training mode on `device`. Only what
            is tuned in this round requires a gradient.
        batches: The site's examples, in batches of the run's size: as many as the run wants, in a new order in each
            pass, the same for the same seed.
        optimizer: What `[training]` says, new, over the tuned parameters.
        settings: `[training]`.
        device: Where the module is and batches must go.
        step: To be called after every optimizer step with the mean loss of its batch. It reports progress, and raises
            `TrainingFailed`, to be let through, if the loss is not finite or training is to end.
    """

    module: nn.Module
    batches: Iterable[Examples]
    optimizer: torch.optim.Optimizer
    settings: TrainingConfig
    device: torch.device
    step: Callable[[torch.Tensor], None]


class Kind(ABC):
    """A kind of model. One object of it is made without arguments; it keeps no state.

    Everything else is FedPEFT's as it is for images: PEFT methods, seeds, fingerprints, weights files, labels by name,
    what is sent and what stays. Torch's global generators are seeded before `module` and `train`, and put back after.
    """

    @abstractmethod
    def module(self, config: ModelConfig) -> nn.Module:
        """Returns the model that a run names, with random values.

        Args:
            config: `[model]`; its `variant` is what stands behind the colon of `name`, `options` that table of a run.

        Raises:
            ModelInvalid: If there is no such model, or an option is wrong.
        """

    @abstractmethod
    def anatomy(self, module: nn.Module) -> Anatomy:
        """Returns where the head is, a linear layer, and where the blocks are that PEFT methods attach to, if any."""

    @abstractmethod
    def read(self, path: Path) -> Examples:
        """Reads a site's data.

        Raises:
            DataInvalid: If there is nothing there that can be read.
        """

    @abstractmethod
    def train(self, task: Task) -> None:
        """Trains the tuned parameters of `task.module` where they are: the training loop."""

    @abstractmethod
    def evaluate(self, module: nn.Module, examples: Examples, device: torch.device) -> dict[str, float]:
        """Returns the figures of a model in evaluation mode on held-out examples; gradients are off.

        `accuracy` (0 to 1) and `loss` are shown as such; `fedpeft.training.evaluation.scores` has them of a classifier.
        """


def installed() -> list[str]:
    """Returns the names of the kinds that packages of this machine bring, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


@cache
def kind_of(name: str) -> Kind:
    """Returns the kind of this name.

    Raises:
        ModelInvalid: If no package here brings it, or its class cannot be made.
    """
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        known = ", ".join(installed()) or "none beside images"
        text = f"there is no kind of model {name!r} on this machine; installed: {known}"
        raise ModelInvalid(f"model.name: {text}", (("model.name", text),))
    try:
        made = found[0].load()()
    except Exception as error:  # whatever the import of somebody's package raises
        raise ModelInvalid(f"kind {name!r} ({found[0].value}): {type(error).__name__}: {error}") from error
    if not isinstance(made, Kind):
        raise ModelInvalid(
            f"kind {name!r} ({found[0].value}) is a {type(made).__name__}, not a fedpeft.models.kind.Kind"
        )
    return made
