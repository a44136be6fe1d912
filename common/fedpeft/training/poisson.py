"""Poisson sampling: every example is in a batch with the same probability, apart from all others and other batches.

It is what amplification by sampling is proved for; batches of a shuffled pass are not. Who is drawn must be a secret,
so the draws come from a key of the operating system's generator: it stays in memory, and no seed of the run leads to
it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpeft.config import TrainingConfig
from fedpeft.training.batches import BatchOrder

_WORD = 64


class PoissonOrder(BatchOrder):
    """The positions of every batch; the same in each repeat of one object, which no other can repeat.

    Args:
        settings: `batch_size` is the expected size of a batch.
        examples: Number of examples, each drawn with a probability of `batch_size / examples`, at most 1.
    """

    def __init__(self, settings: TrainingConfig, examples: int) -> None:
        super().__init__(settings, examples, 0)
        self._key = os.urandom(32)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        # The largest word that is drawn; rounded down, so that no example is drawn more often than is accounted for.
        last = min(self._size * 2**_WORD // self._examples, 2**_WORD) - 1
        for step in range(self.steps):
            stream = hashlib.shake_256(self._key + step.to_bytes(8, "little")).digest(self._examples * _WORD // 8)
            yield np.flatnonzero(np.frombuffer(stream, "<u8") <= np.uint64(last))
