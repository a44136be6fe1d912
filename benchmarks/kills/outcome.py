"""Outcomes of runs in which a process was killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from processes import SILENT_S

ROUNDS, CLIENTS = 8, 3
AWAY_S = 3.0
"""A killed process is started again after so long, as systemd does."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run whose process was killed.

    Attributes:
        rounds: Rounds that ended, of `ROUNDS`.
        updates: Updates that were counted, of `ROUNDS * CLIENTS`.
        status: The framework's own word on the run at the end.
        right: True if the result is the one of a run in which nothing was killed.
        pause_s: Seconds from the kill until the next round ended; None if none did.
    """

    rounds: int
    updates: int
    status: str
    right: bool
    pause_s: float | None


def last_round(rounds: Callable[[], int], over: Callable[[], bool], killed_at: float) -> float | None:
    """Waits until the run is over, or stuck; returns the seconds until the first round after the kill, None if none."""
    before, pause_s, moved = rounds(), None, time.monotonic()
    while time.monotonic() - moved < SILENT_S:
        now = rounds()
        if now > before:
            before, moved = now, time.monotonic()
            pause_s = moved - killed_at if pause_s is None else pause_s
        if now >= ROUNDS or over():
            break
        time.sleep(2)
    return pause_s
