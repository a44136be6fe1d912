"""Coordinate-wise median: each value of Delta is the median of the clients' (1803.01498).

Fewer than half of the clients cannot move a value beyond those of the others. Weights do not enter: examples are what a
client claims. Of an even number of clients it is the mean of the two in the middle.
"""

from __future__ import annotations

import numpy as np

from fedpeft.aggregation import BlockStrategy, Doubles, UpdateFacts, strategies
from fedpeft.aggregation.scaled_step import ScaledStep


@strategies.register("median")
class Median(ScaledStep, BlockStrategy):
    """The coordinate-wise median of the clients' changes."""

    def weigh(self, facts: UpdateFacts) -> float:
        """See `Strategy.weigh`; all weigh the same."""
        return 1.0

    def reduce(self, block: Doubles, weights: Doubles) -> Doubles:
        """See `BlockStrategy.reduce`."""
        ordered: Doubles = np.sort(block, axis=0)
        middle: Doubles = ordered[len(block) // 2]
        return middle.copy() if len(block) % 2 else (ordered[len(block) // 2 - 1] + middle) / 2
