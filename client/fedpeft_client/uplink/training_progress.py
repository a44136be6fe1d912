"""Progress of a training, from the worker to the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST = 2**32 - 1
"""Largest number of the message."""


@dataclass
class TrainingProgress:
    """Optimizer steps of one ticket.

    Attributes:
        step: Those that are done.
        steps: Those in all; 0 while the worker has not said, and where what it said makes no sense.
    """

    step: int = 0
    steps: int = 0

    def take(self, progress: Mapping[str, Any]) -> None:
        """Takes what the worker says; its figures may be of another task and not make sense."""
        step, steps = progress.get("step"), progress.get("steps")
        if isinstance(step, int) and isinstance(steps, int) and 0 <= step <= steps <= _LARGEST:
            self.step, self.steps = step, steps
