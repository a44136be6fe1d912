"""Progress of the worker as occasional log lines."""

from __future__ import annotations

import time
from typing import Any

from fedpeft.process.logs import Log
from fedpeft_client.timing import TIMING, Timing


class Reporter:
    """Says how far something is now and then, so nothing of what is done sooner.

    Args:
        log: Log for progress.
        what: Name of the work under way.
        timing: The client's.
    """

    def __init__(self, log: Log, what: str, timing: Timing = TIMING) -> None:
        self._every_s = timing.report_s
        self._log = log
        self._what = what
        self._said = time.monotonic()

    def __call__(self, progress: dict[str, Any]) -> None:
        """Takes one progress event of the worker."""
        now = time.monotonic()
        if now - self._said >= self._every_s:
            self._said = now
            self._log.info(self._what, **progress)
        else:
            self._log.debug(self._what, **progress)
