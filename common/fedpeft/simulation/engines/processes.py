"""processes: several worker processes, each with the model loaded, and with as many of torch's threads as this one.

The number of threads is part of the bits: with the same number, `inprocess` computes the same. So this process's number
(`--threads`) says how many workers the machine has cores for.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
import structlog
import torch

from fedpeft.data.contents import known_digests
from fedpeft.data.examples import Examples
from fedpeft.data.sources.interface import origin
from fedpeft.errors import TrainingFailed
from fedpeft.rounds.local_job import LocalJob, LocalOutcome
from fedpeft.simulation.engines.engine import AHEAD, ConcurrentEngine, engines
from fedpeft.simulation.local_trainer import Inputs, LocalTrainer

LEAVE_S = 5.0
"""Time that a worker has to end before it is killed, seconds."""

_NO_ROWS = np.zeros(0, np.int64)
_COMMAND = (sys.executable, "-m", "fedpeft.simulation.worker")
_log = structlog.get_logger(__name__)


class _Worker:
    """A worker process; `client` is the one whose job it has, if it has one."""

    def __init__(self, inputs: Inputs, threads: int) -> None:
        ours, theirs = socket.socketpair()
        path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *(each or os.getcwd() for each in sys.path)])
        with theirs:  # its standard output is this one's standard error: ours may carry results
            self._process = subprocess.Popen(
                _COMMAND, stdin=theirs.fileno(), stdout=2, env={**os.environ, "PYTHONPATH": path}
            )
        self.connection = Connection(ours.detach())
        self.client = ""
        sources = (each for each in inputs.clients.values() if not isinstance(each, Path | Examples))
        self._send((inputs, threads, known_digests(origin(each, _NO_ROWS)[0] for each in sources)))

    def begin(self, job: LocalJob) -> None:
        """Gives it a job."""
        self.client = job.client
        self._send(job)

    def outcome(self) -> LocalOutcome:
        """Waits for the outcome of its job.

        Raises:
            TrainingFailed: If it died.
            FedpeftError: What it raised instead, such as `DataInvalid`.
        """
        try:
            found = self.connection.recv()
        except (EOFError, OSError):
            raise TrainingFailed(f"client {self.client}: the worker process that trained it {self._end()}") from None
        if isinstance(found, Exception):
            raise found
        self.client = ""
        outcome: LocalOutcome = found
        return outcome

    def stop(self) -> None:
        """Ends it, in the middle of a job too; `close` waits for that."""
        self._process.terminate()

    def close(self) -> None:
        """Waits until it has ended, and kills it if it does not."""
        self._end()
        self.connection.close()

    def _send(self, message: object) -> None:
        with suppress(OSError):  # then the end of its answers says what happened
            self.connection.send(message)

    def _end(self) -> str:
        try:
            code = self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


@engines.register("processes")
class Processes(ConcurrentEngine):
    """Hands jobs to worker processes as they become free; they are started with the first job."""

    def __init__(self, trainer: LocalTrainer, workers: int | None = None) -> None:
        super().__init__(trainer, workers)
        self._threads = torch.get_num_threads()
        self._count = workers or max(1, len(os.sched_getaffinity(0)) // self._threads)
        self._workers: list[_Worker] = []

    def close(self) -> None:
        """See `Engine.close`."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def _has_room(self, waiting: int) -> bool:
        """Returns True if a worker is free, or may be started, and few outcomes wait."""
        busy = sum(bool(worker.client) for worker in self._workers)
        return busy < self._count and waiting < AHEAD * self._count

    def _begin(self, job: LocalJob) -> None:
        """See `ConcurrentEngine._begin`."""
        self._free().begin(job)

    def _some_outcomes(self) -> list[LocalOutcome]:
        """See `ConcurrentEngine._some_outcomes`."""
        busy = {worker.connection: worker for worker in self._workers if worker.client}
        return [busy[connection].outcome() for connection in wait(list(busy))]  # type: ignore[index]  # those given

    def _free(self) -> _Worker:
        """Returns a worker without a job; starts one if there is none."""
        for worker in self._workers:
            if not worker.client:
                return worker
        if self._count == 1:
            _log.warning("one worker trains", cores=len(os.sched_getaffinity(0)), threads=self._threads)
        self._workers.append(_Worker(replace(self.trainer.inputs, evaluation=None), self._threads))
        return self._workers[-1]
