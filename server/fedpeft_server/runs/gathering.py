"""For how long a quorum has waited for the next round of a run. In memory: a restart begins anew."""

from __future__ import annotations

import time

from fedpeft.rounds.state_machine import Phase
from fedpeft_server.runs.engine import RunEngine


class Gathering:
    """Times at which quorums came together, for the rounds that runs wait to open."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, float]] = {}

    def waited_s(self, engine: RunEngine, ready: int) -> float:
        """Returns for how many seconds at least a quorum has been waiting; 0 if none is, or no round is to open.

        Args:
            engine: The run.
            ready: Clients that wait for it now.
        """
        run, current = engine.run.id, engine.round
        if current.phase is not Phase.WAITING or ready < engine.run.config.rounds.least_available:
            self._since.pop(run, None)
            return 0.0
        now = time.monotonic()
        number, since = self._since.setdefault(run, (current.number, now))
        if number != current.number:
            self._since[run], since = (current.number, now), now
        return now - since

    def forget(self, run: str) -> None:
        """Forgets a run."""
        self._since.pop(run, None)
