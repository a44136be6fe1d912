"""Division of a data set among clients: the one set of settings that `fedpeft partition` and `[simulation]` share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.data import partitions
from fedpeft.data.examples import Examples
from fedpeft.data.partitions import Indices, Partition
from fedpeft.data.sources.interface import Source
from fedpeft.errors import DataInvalid
from fedpeft.partition_schemes import VARIANTS, Scheme

_SUBSET = 1
"""Second word of the seed that draws the examples, so that they are not drawn like the division."""


@dataclass(frozen=True)
class Division:
    """Rule by which rows are assigned to clients.

    Attributes:
        scheme: iid, dirichlet (label skew), shards (few classes a client), quantity (size skew), natural (a column).
        clients: Number of clients, for all but natural.
        alpha: Concentration, for dirichlet and quantity; sigma for lognormal quantity.
        variant: Variant of dirichlet or quantity; None: the usual one.
        shards: Runs of rows with neighbouring labels that each client gets, for shards.
        column: The column whose values are the clients, for natural.
        examples: Number of rows that are drawn first; None: all of them.
    """

    scheme: Scheme
    clients: int = 1
    alpha: float = 0.1
    variant: str | None = None
    shards: int = 2
    column: str | None = None
    examples: int | None = None

    def of(self, source: Source | Examples, seed: int) -> Partition:
        """Divides a data set.

        Args:
            source: The data set.
            seed: Seed of the draws.

        Returns:
            The rows of each client; together all rows, or those that were drawn.

        Raises:
            DataInvalid: If there are too few rows, no draw gives every client one, or there is no such column.
        """
        if self.examples is None:
            return self._divided(source, np.arange(len(source)), seed)
        rows = drawn_rows(len(source), self.examples, seed)
        split = self._divided(source, rows, seed)
        return replace(split, parts=tuple(rows[part] for part in split.parts))

    def _divided(self, source: Source | Examples, rows: Indices, seed: int) -> Partition:
        labels = source.labels[rows]
        match self.scheme:
            case "iid":
                return partitions.iid(len(rows), self.clients, seed)
            case "dirichlet":
                return partitions.dirichlet(labels, self.clients, self.alpha, seed, self._variant)  # type: ignore[arg-type]
            case "shards":
                return partitions.shards(labels, self.clients, self.shards, seed)
            case "quantity":
                return partitions.quantity(len(rows), self.clients, self.alpha, seed, self._variant)  # type: ignore[arg-type]
            case "natural":
                column = str(self.column)
                if isinstance(source, Examples):
                    raise DataInvalid(f"only images can have columns, such as {column!r}")
                values = source.column(column)
                return partitions.natural([values[row] for row in rows], column)

    @property
    def _variant(self) -> str:
        return self.variant or VARIANTS[self.scheme][0]


def drawn_rows(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Draws rows without replacement; ascending, int64[count].

    Raises:
        DataInvalid: If there are fewer.
    """
    if count > rows:
        raise DataInvalid(f"there are {rows:,} rows, fewer than the {count:,} that are to be drawn of them")
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _SUBSET])))
    return np.sort(generator.permutation(rows)[:count]).astype(np.int64)
