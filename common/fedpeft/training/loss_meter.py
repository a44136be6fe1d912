"""Losses of optimizer steps, and what is reported of them."""

from __future__ import annotations

import math

import torch

from fedpeft.errors import TrainingFailed


class LossMeter:
    """Losses of steps, fetched from the device a few at a time, weighed by examples."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._waiting: list[tuple[torch.Tensor, int, bool]] = []
        self._sum = 0.0
        self._examples = 0
        self._count = 0
        self._first = self._last = math.nan

    def add(self, loss: torch.Tensor, examples: int, last_pass: bool) -> None:
        """Takes the mean loss of a step over so many examples."""
        self._waiting.append((loss, examples, last_pass))
        if len(self._waiting) >= self._every:
            self.flush()

    def flush(self) -> float:
        """Fetches what is waiting and returns the last loss.

        Raises:
            TrainingFailed: If a loss is not finite.
        """
        values = torch.stack([loss for loss, _, _ in self._waiting]).tolist() if self._waiting else []
        for value, (_, examples, last_pass) in zip(values, self._waiting, strict=True):
            self._count += 1
            if not math.isfinite(value):
                raise TrainingFailed(f"the loss is {value} in step {self._count}; lower the learning rate")
            if self._count == 1:
                self._first = value
            self._last = value
            if last_pass:
                self._sum += value * examples
                self._examples += examples
        self._waiting.clear()
        return self._last

    def metrics(self) -> dict[str, float]:
        """Returns loss, loss_first, loss_last."""
        return {"loss": self._sum / max(self._examples, 1), "loss_first": self._first, "loss_last": self._last}
