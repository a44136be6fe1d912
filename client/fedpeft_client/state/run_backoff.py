"""Runs that this client leaves out for a while: work for them failed, and others must not wait for that.

A run is left out after FAILURES in a row, or at once if its server failed in every attempt at a call; for a
minute, and for twice as long each time that it fails again afterwards. It is tried again when that is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from fedpeft_client.state.bounded import BoundedDict
from fedpeft_client.timing import TIMING, Timing

FAILURES = 3
"""So many failures in a row are taken for more than bad luck."""
MAX_HELD = 32
"""Runs that AwaitRound takes as left out."""
MOST = 256
"""Runs whose failures are kept: a server may name as many as it likes. That which failed longest ago is forgotten."""


@dataclass
class _Record:
    """Failures of a run in a row, how long it was left out last, and until when it is."""

    failures: int = 0
    hold_s: float = 0.0
    until: float = 0.0


class RunBackoff:
    """Exponential backoff by run: the runs that are left out now.

    Args:
        now: The clock, in seconds; monotonic.
        timing: The client's.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic, timing: Timing = TIMING) -> None:
        self._timing = timing
        self._now = now
        self._records: BoundedDict[str, _Record] = BoundedDict(MOST)

    def failed(self, run: str, *, surely: bool = False) -> float:
        """Counts a failure of a run; `surely` if trying again at once is known to be of no use.

        Returns:
            For how many seconds the run is left out from now on; 0 if it is not.
        """
        record = self._records.get(run) or _Record()
        self._records.put(run, record)
        record.failures += 1
        if record.failures < FAILURES and not surely and not record.hold_s:
            return 0.0
        record.hold_s = min(2 * record.hold_s or self._timing.first_hold_s, self._timing.longest_hold_s)
        record.until = self._now() + record.hold_s
        return record.hold_s

    def succeeded(self, run: str) -> None:
        """Forgets the failures of a run."""
        self._records.pop(run, None)

    def held(self) -> list[str]:
        """Returns the runs that are left out now, those that are for longest first."""
        now = self._now()
        held = [(record.until, run) for run, record in self._records.items() if record.until > now]
        return [run for _, run in sorted(held, reverse=True)][:MAX_HELD]
