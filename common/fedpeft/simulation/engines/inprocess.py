"""inprocess: one client after the other, in the process of the simulation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedpeft.rounds.local_job import LocalJob, LocalOutcome
from fedpeft.simulation.engines.engine import Engine, engines


@engines.register("inprocess")
class InProcess(Engine):
    """Takes a job, trains it with the trainer of this process, and yields its outcome before it takes the next."""

    def run(self, jobs: Iterable[LocalJob]) -> Iterator[LocalOutcome]:
        """See `Engine.run`."""
        return map(self.trainer.train, jobs)
