"""The fault by which label skew was lost: a Dirichlet division made for one random subset and applied to another.

    fedpeft study run experiments/faults/skew.toml --import experiments/faults/lost_skew.py --data cifar10=DIR --out DIR

Beside the same study without `--import`, which has the skew that it says.
"""

from __future__ import annotations

import numpy as np

from fedpeft.data.division import Division, drawn_rows
from fedpeft.data.examples import Examples
from fedpeft.data.partitions import Indices, Partition
from fedpeft.data.sources.interface import Source

_divided = Division._divided


def divided_for_others(self: Division, source: Source | Examples, rows: Indices, seed: int) -> Partition:
    """Divides as many rows as there are, drawn anew, and has the result stand for these."""
    others = drawn_rows(len(source), len(rows), seed + 1)
    if np.array_equal(others, rows):
        raise ValueError("both subsets are the whole data set; give simulation.examples")
    return _divided(self, source, others, seed)


Division._divided = divided_for_others  # type: ignore[method-assign]
