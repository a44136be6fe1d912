"""Progress of a training, from the worker to the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGEST = 2**32 - 1
"""Largest number of the message."""


@dataclass
class TrainingProgress:
    """Optimizer steps of one ticket, and the updates that a relay collects for it.

    Attributes:
        step: Those that are done.
        steps: Those in all; 0 while the worker has not said, and where what it said makes no sense.
        updates: Updates that are there.
        wanted: Those that are wanted; 0 for a client that trains itself.
    """

    step: int = 0
    steps: int = 0
    updates: int = 0
    wanted: int = 0

    def take(self, progress: Mapping[str, Any]) -> None:
        """Takes what the worker says; its figures may be of another task and not make sense."""
        if part := _part(progress.get("step"), progress.get("steps")):
            self.step, self.steps = part
        if part := _part(progress.get("updates"), progress.get("of")):
            self.updates, self.wanted = part


def _part(done: object, total: object) -> tuple[int, int] | None:
    """Returns what is done of a total; None if it makes no sense."""
    if isinstance(done, int) and isinstance(total, int) and 0 <= done <= total <= _LARGEST:
        return done, total
    return None


NONE = TrainingProgress()
"""Nothing to say."""
