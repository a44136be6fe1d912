"""Whether this site fits a run: its data, its method and its backbone, proved before the first round."""

from __future__ import annotations

from typing import Any

from fedpeft.errors import FedpeftError
from fedpeft.logs import Log
from fedpeft_client.runs import KnownRun
from fedpeft_client.worker_process import WorkerProcess

Report = dict[str, Any]


class Fitness:
    """Verdicts on runs; each is reached once in the life of the process.

    Attributes:
        examples: Training examples after label mapping, of the run proved last; 0 before any.
    """

    def __init__(self, worker: WorkerProcess, log: Log) -> None:
        self._worker = worker
        self._log = log
        self._proved: dict[str, Report] = {}
        self._condemned: dict[str, FedpeftError] = {}
        self.examples = 0

    async def prove(self, run: KnownRun) -> Report:
        """Returns what the worker found: `examples`, `classes` (examples by class), `model_parameters`, `fingerprint`.

        Raises:
            BackboneMismatch: If the frozen tensors here are not those of the run.
            SpecInvalid: If the method here tunes other tensors than the run's.
            ConfigInvalid: If the method or an option of it is unknown here.
            DataInvalid: If the data does not fit the run's classes.
            ModelInvalid: If the model or its weights cannot be used.
            TrainingFailed: If the worker died of it.
        """
        self.refuse_condemned(run.id)
        if run.id not in self._proved:
            report = await self._worker.ask({"op": "check", "run": run.as_json()})
            self._proved[run.id] = report
            self.examples = int(report["examples"])
            self._log.info(
                "run fits this site",
                run=run.id,
                name=run.config.name,
                method=run.spec.method,
                parameters=run.spec.parameters,
                examples=self.examples,
            )
        return self._proved[run.id]

    def refuse_condemned(self, run: str) -> None:
        """Raises the error that a run was condemned for, if it was."""
        if run in self._condemned:
            raise self._condemned[run]

    def condemn(self, run: str, error: FedpeftError) -> None:
        """Remembers that this site cannot work for a run, until the process ends."""
        self._condemned[run] = error
