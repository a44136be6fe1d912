"""Labelled examples in memory: the data of a task that reads no images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import UNLABELLED
from fedpeft.errors import DataInvalid


@dataclass(frozen=True)
class Examples:
    """Labelled examples: a site's, a part of them, or a batch.

    Attributes:
        values: One a row: [n, ...] of whatever dtype the task reads.
        labels: Positions in `class_names`, int64[n].
        class_names: The site's own as `Task.read` returns them; the run's, in its order, in training and evaluation.

    Raises:
        DataInvalid: If there is not one label in range for each value, or there are none.
    """

    values: NDArray[Any] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    class_names: tuple[str, ...]
    unnamed: ClassVar[frozenset[str]] = frozenset()
    """See `fedpeft.data.sources.interface.Source.unnamed`."""

    def __post_init__(self) -> None:
        if not len(self.labels) or len(self.values) != len(self.labels):
            raise DataInvalid(f"{len(self.values)} examples with {len(self.labels)} labels; one for each is needed")
        if self.labels.min() < 0 or self.labels.max() >= len(self.class_names):
            raise DataInvalid(f"a label is not a position in the {len(self.class_names)} class names")

    @classmethod
    def unlabelled(cls, values: NDArray[Any]) -> Examples:
        """Returns examples of a task without classes: all are of the one class that its run files then have."""
        return cls(values, np.zeros(len(values), np.int64), (UNLABELLED,))

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: NDArray[np.int64]) -> Examples:
        """Returns some of the examples, in the order of `rows`."""
        return Examples(self.values[rows], self.labels[rows], self.class_names)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.class_names

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self)

    def batches(self, orders: Iterable[NDArray[np.int64]]) -> Iterator[Examples]:
        """Yields the examples at each array of positions."""
        return map(self.select, orders)
