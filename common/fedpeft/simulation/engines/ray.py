"""ray: workers on the machines of a Ray cluster, each with the model loaded and with as many threads of torch as here.

Notable: a job is a pure function of its value, so one that is lost with its machine is given to another worker and
makes the same bits. Not so where clients add noise, which is never drawn twice; the budget counts the job once, for
nobody has seen what was lost. Workers are actors without Ray's own restarts: a job is given only to a worker that has
loaded, so that none waits behind one for which the cluster that is left has no room.

A cluster that is started here has its logs and sockets in a temporary folder of its own, which goes with it.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import socket
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import structlog
import torch

from fedpeft import extensions
from fedpeft.config import RunConfig
from fedpeft.config_errors import Fault
from fedpeft.errors import SettingsInvalid, TrainingFailed
from fedpeft.formatting import counted
from fedpeft.rounds.local_job import LocalJob, LocalOutcome
from fedpeft.simulation.engines.engine import AHEAD, ConcurrentEngine, engines
from fedpeft.simulation.local_trainer import LocalTrainer
from fedpeft.simulation.ray_worker import Host, RayWorker, versions_here

ADDRESS = "RAY_ADDRESS"
"""Ray's own variable: the cluster's address; without it one is started on this machine, for the simulation alone."""
ATTEMPTS = 4
"""Workers that may be lost with one job, or in starting one after the other: it is the job then, and no machine."""
CONNECT_S = 10.0
"""Time in which a cluster must take a connection, seconds."""
LOCAL = "local"
"""The address that means a new cluster of this machine."""
NOTICE_S = 10.0
"""A cluster in which no worker is ready is said so often, seconds."""
START_S = 600.0
"""Time in which some worker must become ready where there is none, seconds."""

LONGEST_FOLDER = 36
"""Bytes of the path of a cluster's folder: its sockets lie up to 70 deeper, and the system takes 107 for all."""

_HOST_AND_PORT = re.compile(r"(?![a-z]+://).+:[0-9]{1,5}")
_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Task:
    """A job, and how often it was lost."""

    job: LocalJob
    payload: Any
    losses: int = 0


@dataclass(eq=False)
class _Worker:
    """An actor; `answer` is what it was asked for last, `host` is None until it has loaded."""

    actor: Any
    answer: Any
    host: Host | None = None
    task: _Task | None = None

    @property
    def is_free(self) -> bool:
        return self.host is not None and self.task is None

    def __str__(self) -> str:
        return f"{self.host.node}, process {self.host.pid}" if self.host else "that was being started"


@engines.register("ray")
class Ray(ConcurrentEngine):
    """Hands jobs to actors as they become free; they are started as there are jobs for them."""

    def __init__(self, trainer: LocalTrainer, workers: int | None = None) -> None:
        super().__init__(trainer, workers)
        import ray

        self._ray: Any = ray
        self._threads = torch.get_num_threads()
        self._count, self._gpus = 0, 0.0
        self._inputs: Any = None
        self._workers: list[_Worker] = []
        self._waiting: deque[_Task] = deque()
        self._failed_starts = 0
        self._idle_since: float | None = None
        self._version: tuple[bytes, Any] | None = None
        self._is_ours = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def misfit(cls, config: RunConfig, device: torch.device) -> Fault | None:
        """See `Engine.misfit`: Ray may not be installed."""
        try:
            import ray  # noqa: F401
        except ModuleNotFoundError as error:
            return "simulation.engine", f'is "ray", which needs {error.name}: pip install "fedpeft[ray]"'
        return None

    def close(self) -> None:
        """See `Engine.close`."""
        for worker in self._workers:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker.actor)
        self._workers.clear()
        self._waiting.clear()
        self._version = None
        if self._is_ours:
            self._ray.shutdown()
            self._is_ours = False
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _has_room(self, waiting: int) -> bool:
        """Returns True if a worker is free, or may be started, and few outcomes wait."""
        if not self._count:
            self._connect()
        under_way = len(self._waiting) + sum(worker.task is not None for worker in self._workers)
        return under_way < self._count and waiting < AHEAD * self._count

    def _begin(self, job: LocalJob) -> None:
        """See `ConcurrentEngine._begin`."""
        self._waiting.append(_Task(job, self._payload(job)))
        self._assign()

    def _connect(self) -> None:
        """Connects to the cluster, unless this program did, and finds how many workers it has room for."""
        if not self._ray.is_initialized():
            self._start(os.environ.get(ADDRESS) or LOCAL)
            self._is_ours = True
        device = self.trainer.run.device.type  # without a number: Ray shows each worker its own GPUs only
        if device == "cuda":
            there = sum(int(node.get("GPU", 0)) for node in self._nodes())
            self._gpus = share_of_gpu(self.workers or 1, max(1, there))
        self._count = self.workers or max(1, sum(map(self._places, self._nodes())))
        self._inputs = self._ray.put(pickle.dumps(replace(self.trainer.inputs, evaluation=None, device=device)))

    def _start(self, address: str) -> None:
        """Connects to a cluster, or starts one of this machine alone."""
        settings: dict[str, Any] = {"logging_level": "warning"}
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent without being asked for
            cores = len(os.sched_getaffinity(0))
            settings |= {"num_cpus": max(cores, self._threads * (self.workers or 1)), "include_dashboard": False}
            self._folder = _short_folder()
            settings |= {"_temp_dir": self._folder.name} if self._folder else {}
        try:
            if _HOST_AND_PORT.fullmatch(address):  # Ray itself tries for minutes
                host, _, port = address.rpartition(":")
                socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
            self._ray.init(address=address, **settings)
        except (OSError, OverflowError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise SettingsInvalid(f"cannot use the Ray cluster at {address} ({ADDRESS}): {error}") from None

    def _nodes(self) -> list[dict[str, float]]:
        """Returns the resources of the machines that are alive."""
        return [node["Resources"] for node in self._ray.nodes() if node["Alive"]]

    def _places(self, resources: dict[str, float]) -> int:
        """Returns how many workers a machine has room for."""
        places = resources.get("CPU", 0) // self._threads
        return int(min(places, resources.get("GPU", 0) // self._gpus) if self._gpus else places)

    def _payload(self, job: LocalJob) -> Any:
        """Returns the version of a job in Ray's store; jobs that follow each other mostly share it."""
        sha256 = job.version.manifest.sha256
        if self._version is None or self._version[0] != sha256:
            self._version = sha256, self._ray.put(job.version.payload.read_bytes())
        return self._version[1]

    def _assign(self) -> None:
        """Gives jobs to free workers, and starts workers for those that are left."""
        for worker in self._workers:
            if worker.is_free and self._waiting:
                worker.task = self._waiting.popleft()
                worker.answer = worker.actor.train.remote(pickle.dumps(worker.task.job), worker.task.payload)
        starting = sum(worker.host is None for worker in self._workers)
        for _ in range(min(len(self._waiting) - starting, self._count - len(self._workers))):
            remote = self._ray.remote(RayWorker)
            actor = remote.options(
                num_cpus=self._threads, num_gpus=self._gpus, max_restarts=0, **_environment()
            ).remote()
            self._workers.append(_Worker(actor, actor.load.remote(self._inputs, self._threads)))

    def _some_outcomes(self) -> list[LocalOutcome]:
        """Waits until a worker has answered; returns the outcomes that came, if any did."""
        asked = {worker.answer: worker for worker in self._workers if not worker.is_free}
        answered, _ = self._ray.wait(list(asked), num_returns=1, timeout=NOTICE_S)
        outcomes = [outcome for each in answered if (outcome := self._taken(asked[each])) is not None]
        self._assign()
        self._check_idle()
        return outcomes

    def _taken(self, worker: _Worker) -> LocalOutcome | None:
        """Takes the answer of a worker; returns the outcome of its job, None if it has loaded or is lost.

        Raises:
            FedpeftError: The answer, if that is an error that ends the simulation.
            TrainingFailed: If too many workers were lost.
        """
        try:
            found = pickle.loads(self._ray.get(worker.answer))
        except self._ray.exceptions.RayTaskError:
            raise  # of our own code: the same everywhere
        except self._ray.exceptions.RayError as error:
            self._lose(worker, error)
            return None
        if isinstance(found, Exception):
            raise found
        self._failed_starts = 0
        if isinstance(found, Host):
            _check_versions(found)
            worker.host = found
            return None
        worker.task = None
        outcome: LocalOutcome = found
        return outcome

    def _lose(self, worker: _Worker, error: Exception) -> None:
        """Puts the job of a worker that is gone before all others."""
        cause = str(error).strip().partition("\n")[0]
        self._workers.remove(worker)
        if (task := worker.task) is None:
            self._failed_starts += 1
            if self._failed_starts >= ATTEMPTS * self._count:
                raise TrainingFailed(f"{counted(self._failed_starts, 'worker')} of the Ray cluster were lost: {cause}")
            _log.warning("a worker was lost while it was started", cause=cause)
            return
        task.losses += 1
        client = task.job.client
        if task.losses >= ATTEMPTS:
            lost = f"{counted(task.losses, 'worker')} of the Ray cluster that trained it were lost"
            raise TrainingFailed(f"client {client}: {lost}, the last one on {worker}: {cause}")
        _log.warning("a worker was lost, its job is given to another one", client=client, worker=str(worker))
        self._waiting.appendleft(task)

    def _check_idle(self) -> None:
        """Says that the cluster has no room for a worker, and raises `TrainingFailed` if that lasts."""
        now = time.monotonic()
        if any(worker.host for worker in self._workers):
            self._idle_since = None
            return
        self._idle_since = self._idle_since or now
        waited = now - self._idle_since
        if waited < NOTICE_S:
            return
        needs = f"{counted(self._threads, 'CPU')}" + (f" and {self._gpus:g} GPUs" if self._gpus else "")
        room = sum(map(self._places, self._nodes()))
        if waited > START_S:
            raise TrainingFailed(
                f"no worker of the Ray cluster was ready within {START_S:.0f} s; each needs {needs} of one machine, "
                f"and the cluster has room for {room}; --threads says how many CPUs"
            )
        _log.warning("no worker of the Ray cluster is ready yet", needs=needs, room=room, waited_s=round(waited))


def _short_folder() -> tempfile.TemporaryDirectory[str] | None:
    """Makes a folder for a cluster; returns None if none has a short path, for Ray's own choice, which stays."""
    for place in (os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "/tmp"):
        try:
            made = tempfile.TemporaryDirectory(prefix="fedpeft-ray-", dir=place, ignore_cleanup_errors=True)
        except OSError:
            continue
        if len(os.fsencode(made.name)) <= LONGEST_FOLDER:
            return made
        made.cleanup()
    return None


def _environment() -> dict[str, Any]:
    """Returns an actor's option that has it import the modules of this process, see `fedpeft.extensions`."""
    named = os.environ.get(extensions.VARIABLE)
    return {"runtime_env": {"env_vars": {extensions.VARIABLE: named}}} if named else {}


def share_of_gpu(workers: int, gpus: int) -> float:
    """Returns the share of a GPU that a worker takes, in Ray's steps of 1/10,000: all of it while GPUs are enough."""
    return 10_000 // math.ceil(workers / gpus) / 10_000


def _check_versions(host: Host) -> None:
    """Refuses a machine with other software: its bits would be others."""
    for (name, there), (_, here) in zip(host.versions, versions_here(), strict=True):
        if there != here:
            raise SettingsInvalid(
                f"the machine {host.node} of the Ray cluster has {name} {there}, and this one {here}; install the same"
            )
