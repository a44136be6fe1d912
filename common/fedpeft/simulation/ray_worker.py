"""A worker of the engine ray: an actor on any node of a cluster, which loads model and data, and trains jobs.

Notable: arguments and answers are pickles that Ray does not look into. Arrays that Ray unpacks itself are read-only
views of its store; these are arrays of this process's own, as a worker process of one machine has them. The version of
a job is a file of the machine that holds the simulation, so its bytes come beside the job, and lie in a file here: one
without a name, for Ray ends a worker by SIGKILL.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from fedpeft import __version__, extensions
from fedpeft.errors import FedpeftError
from fedpeft.process import logs
from fedpeft.rounds.local_job import LocalJob, Version

if TYPE_CHECKING:
    from fedpeft.simulation.local_trainer import LocalTrainer


@dataclass(frozen=True)
class Host:
    """A worker's process.

    Attributes:
        node: Address of its machine.
        pid: Its process id there.
        versions: Versions of FedPEFT and torch, and digests of the modules of `--import`: bits depend on them.
    """

    node: str
    pid: int
    versions: tuple[tuple[str, str], ...]


def versions_here() -> tuple[tuple[str, str], ...]:
    """Returns the versions that a cluster's machines must share."""
    import torch

    return (("fedpeft", __version__), ("torch", torch.__version__), *extensions.digests().items())


class RayWorker:
    """Methods of the actor; each returns an error that ends the simulation as its answer, pickled like any other."""

    def __init__(self) -> None:
        os.dup2(2, 1)  # Ray prints both streams where the simulation runs, whose standard output may carry results
        logs.to_standard_error()
        self._held: tuple[bytes, BinaryIO] | None = None
        self._trainer: LocalTrainer | None = None
        self._node = ""

    def load(self, inputs: bytes, threads: int) -> bytes:
        """Loads model and data; answers with `Host`."""
        import ray
        import torch

        from fedpeft.simulation.local_trainer import LocalTrainer

        torch.set_num_threads(threads)
        self._node = str(ray.util.get_node_ip_address())
        try:
            host = Host(self._node, os.getpid(), versions_here())
            self._trainer = LocalTrainer(pickle.loads(inputs))
        except (FedpeftError, OSError) as error:
            return self._failed(error)
        return pickle.dumps(host)

    def train(self, job: bytes, payload: bytes) -> bytes:
        """Trains a job from a version's bytes; answers with its `LocalOutcome`."""
        assert self._trainer is not None  # loaded before it is given jobs
        given: LocalJob = pickle.loads(job)
        try:
            version = Version(given.version.manifest, self._file(given.version.manifest.sha256, payload))
            return pickle.dumps(self._trainer.train(replace(given, version=version)))
        except (FedpeftError, OSError) as error:
            return self._failed(error)

    def _file(self, sha256: bytes, payload: bytes) -> Path:
        """Returns the file of a version, in place of the one before it."""
        if self._held is None or self._held[0] != sha256:
            file = tempfile.TemporaryFile()  # noqa: SIM115  # open until the next version
            file.write(payload)
            file.flush()
            self._held = sha256, file
        return Path(f"/proc/self/fd/{self._held[1].fileno()}")

    def _failed(self, error: FedpeftError | OSError) -> bytes:
        """Returns an error that names the machine: data and weights are looked for there."""
        if isinstance(error, FedpeftError):
            error = type(error)(f"{error.message} (on the machine {self._node} of the Ray cluster)", error.fields)
        return pickle.dumps(error)
