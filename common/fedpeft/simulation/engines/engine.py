"""The interface of an engine, and the registry by which `[simulation] engine` finds one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import torch

from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault
from fedpeft.errors import ConfigInvalid
from fedpeft.registry import Registry
from fedpeft.rounds.local_job import LocalFailure, LocalJob, LocalOutcome
from fedpeft.simulation.local_trainer import LocalTrainer

AHEAD = 2
"""Most jobs a worker that were taken and whose outcomes are not yielded: an outcome waits for those before it."""


class Engine(ABC):
    """Computes jobs, anywhere, to the bits of `trainer.train` or near them. A context manager, entered once.

    Args:
        trainer: This process's trainer, which scores versions too; its `inputs` are what another process would load.
        workers: `[simulation] workers`; None if the run file leaves it to the engine.

    Raises:
        ConfigInvalid: If `misfit` finds a fault.
    """

    def __init__(self, trainer: LocalTrainer, workers: int | None = None) -> None:
        if fault := self.misfit(trainer.run.config, trainer.run.device):
            raise ConfigInvalid(": ".join(fault), (fault,))
        self.trainer = trainer
        self.workers = workers

    @classmethod
    def misfit(cls, config: RunConfig, device: torch.device) -> Fault | None:
        """Returns a field of a run that the engine cannot compute here, and why; None, as here, if there is none.

        It is asked of the run file before anything runs, and of the run as a server has it, which has no `simulation`.
        """
        return None

    @property
    def arithmetic(self) -> str:
        """The name of the engine's own bits, other than those of `trainer.train`; empty where they are the same.

        A simulation that was killed goes on only under an engine of the same.
        """
        return ""

    @abstractmethod
    def run(self, jobs: Iterable[LocalJob]) -> Iterator[LocalOutcome]:
        """Yields the outcome of every job, in the order of the jobs.

        Args:
            jobs: Taken one by one, when there is somebody to compute them: whether there is a next one may depend on
                the outcomes yielded before. Not more than a few per worker are taken before their outcomes are yielded.

        Raises:
            DataInvalid: If a client's data cannot be used; the message names the client.
            FedpeftError: Anything else that ends the simulation.
        """

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Releases what the engine holds; jobs under way are dropped."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ConcurrentEngine(Engine):
    """An engine with several jobs at work, whose outcomes come in any order and are yielded in that of the jobs."""

    def run(self, jobs: Iterable[LocalJob]) -> Iterator[LocalOutcome]:
        """See `Engine.run`."""
        source, order, done = iter(jobs), deque[str](), dict[str, LocalOutcome]()
        while True:
            while self._has_room(len(order)) and (job := next(source, None)) is not None:
                order.append(job.client)
                if (failure := self._begin(job)) is not None:
                    done[job.client] = failure
            if not order:
                return
            if order[0] in done:
                yield done.pop(order.popleft())
            else:
                done.update((outcome.client, outcome) for outcome in self._some_outcomes())

    @abstractmethod
    def _has_room(self, waiting: int) -> bool:
        """Returns True if a job can begin, with so many taken whose outcomes are not yielded."""

    @abstractmethod
    def _begin(self, job: LocalJob) -> LocalFailure | None:
        """Gives a job to who computes it; returns why nobody needs to."""

    @abstractmethod
    def _some_outcomes(self) -> list[LocalOutcome]:
        """Waits for outcomes of jobs at work; may return none."""


engines: Registry[type[Engine]] = Registry("fedpeft.simulation.engines", "fedpeft.engines", "engine")


def engine_named(name: str) -> type[Engine]:
    """Returns the engine that `[simulation] engine` names.

    Raises:
        ConfigInvalid: If there is none of that name.
    """
    try:
        return engines.get(name)
    except ConfigInvalid as error:
        raise ConfigInvalid(error.message, (("simulation.engine", error.message),)) from None
