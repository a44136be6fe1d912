"""Progress of the worker as occasional log lines."""

from __future__ import annotations

import time
from typing import Any

from fedpeft.process.logs import Log

EVERY_S = 10.0
"""A line this often; every step only with --verbose."""


class Reporter:
    """Says how far something is every EVERY_S seconds, so nothing of what is done sooner.

    Args:
        log: Where it is said.
        what: What is being done.
    """

    def __init__(self, log: Log, what: str) -> None:
        self._log = log
        self._what = what
        self._said = time.monotonic()

    def __call__(self, progress: dict[str, Any]) -> None:
        """Takes one progress event of the worker."""
        now = time.monotonic()
        if now - self._said >= EVERY_S:
            self._said = now
            self._log.info(self._what, **progress)
        else:
            self._log.debug(self._what, **progress)
