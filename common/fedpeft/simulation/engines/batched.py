"""batched: many clients in one pass over the frozen backbone, each with its own tuned tensors and optimizer.

The bits are not those of one client after another, because products of larger matrices round otherwise;
docs/simulate.md says how far apart they are. They depend on which clients are in a pass, so on their largest number: it
is the same in every repeat, and part of what a simulation that was killed goes on by.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch

from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault
from fedpeft.models.tasks import Batch
from fedpeft.rounds.local_job import LocalFailure, LocalJob, LocalOutcome
from fedpeft.simulation.engines.engine import AHEAD, ConcurrentEngine, engines
from fedpeft.simulation.local_trainer import LocalTrainer, naming
from fedpeft.training.local_round import NO_UPDATE
from fedpeft.training.loop import Training, following, placed
from fedpeft.training.precision import lowered, multiplying, precision
from fedpeft.training.randomness import Stream
from fedpeft.training.stacked import StackedGradients, Turn

CLIENTS = 16
"""Most clients in a pass, unless `[simulation] workers` says otherwise."""


@dataclass(slots=True, eq=False)
class _Client:
    """A client at work, and the batch that it computes next."""

    job: LocalJob
    training: Training
    stream: Stream
    steps: Generator[Batch, torch.Tensor]
    batch: Batch

    @property
    def turn(self) -> Turn:
        return Turn(self.training, self.stream, self.batch)


@engines.register("batched")
class Batched(ConcurrentEngine):
    """Fills the places of a pass with jobs, and each place again as its client finishes.

    It computes in float32 alone, and has no gradients of single examples.
    """

    def __init__(self, trainer: LocalTrainer, workers: int | None = None) -> None:
        super().__init__(trainer, workers)
        self._places = workers or CLIENTS
        run = trainer.run
        self._gradients = StackedGradients(run.trained_task, run.model, run.device)
        self._at_work: list[_Client] = []

    @classmethod
    def misfit(cls, config: RunConfig, device: torch.device) -> Fault | None:
        """See `Engine.misfit`."""
        field, own = "simulation.engine", 'is "batched", which'
        if precision(config.training.precision, device) is not torch.float32:
            text = 'computes in float32; set training.precision = "float32", or take another engine'
            return field, f"{own} {text}"
        if config.privacy is not None and config.privacy.mechanism == "example":
            return field, f'{own} has no gradients of single examples; privacy.mechanism is "example"'
        return None

    @property
    def arithmetic(self) -> str:
        """See `Engine.arithmetic`."""
        return f"batched {self._places}"

    def close(self) -> None:
        """See `Engine.close`."""
        for client in self._at_work:
            client.steps.close()
        self._at_work.clear()

    def _has_room(self, waiting: int) -> bool:
        """Returns True if a place is free, and few outcomes wait."""
        return len(self._at_work) < self._places and waiting < AHEAD * self._places

    def _begin(self, job: LocalJob) -> LocalFailure | None:
        """Gives a job a place; returns why it needs none."""
        try:
            training, stream = self.trainer.begin(job)
            steps = training.steps()
            with naming(job.client), stream.drawn():
                batch = next(steps)
        except NO_UPDATE as error:
            return LocalFailure(job.client, error)
        self._at_work.append(_Client(job, training, stream, steps, batch))
        return None

    def _some_outcomes(self) -> list[LocalOutcome]:
        """Lets the clients at work make steps until at least one has its outcome."""
        run, outcomes = self.trainer.run, list[LocalOutcome]()
        wanted, device = self._at_work[0].job.settings.precision, run.device
        placed(run.model.module, device)
        run.model.train()
        try:
            with multiplying(wanted, device), lowered(run.model.module, precision(wanted, device)):
                while not outcomes:
                    losses = self._gradients.compute([client.turn for client in self._at_work])
                    stepped = zip(list(self._at_work), losses, strict=True)
                    outcomes = [each for client, loss in stepped if (each := self._step(client, loss)) is not None]
        except NO_UPDATE as error:  # of the pass: one client is enough for it
            outcomes = [LocalFailure(client.job.client, error) for client in self._at_work]
            self.close()
        finally:
            run.model.eval()
        return outcomes

    def _step(self, client: _Client, loss: torch.Tensor) -> LocalOutcome | None:
        """Makes a client's step; returns its outcome after the last, or if it failed."""
        name = client.job.client
        try:
            with naming(name), client.stream.drawn():
                batch = following(client.steps, loss)
                if batch is not None:
                    client.batch = batch
                    return None
                update = self.trainer.run.update(client.job, client.training.result())
            outcome: LocalOutcome = self.trainer.figures_of(update)
        except NO_UPDATE as error:
            outcome = LocalFailure(name, error)
        self._at_work.remove(client)
        return outcome
