"""Whether runs suit this site: the verdicts of the worker, each reached once in the life of the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedpeft.errors import FedpeftError
from fedpeft.logs import Log
from fedpeft.v1 import run_pb2
from fedpeft_client.exits import NOT_ABOUT_THE_TASK
from fedpeft_client.runs import KnownRun
from fedpeft_client.suitability import Reason
from fedpeft_client.worker_process import WorkerProcess

Report = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What this site has to say to a run.

    Attributes:
        reasons: Why it does not suit; empty if it does.
        run: The run; None if its description cannot be read here.
        report: What the worker found: `examples`, `classes` (examples by class), `dropped`, `model_parameters`; empty
            if the run does not suit.
    """

    reasons: tuple[Reason, ...]
    run: KnownRun | None = None
    report: Report = field(default_factory=dict)

    @property
    def suits(self) -> bool:
        """Whether nothing speaks against the run."""
        return not self.reasons

    @property
    def examples(self) -> int:
        """Examples of the run's classes; 0 if it does not suit."""
        return int(self.report.get("examples", 0))


class Fitness:
    """Reaches verdicts on runs, and keeps them.

    Attributes:
        verdicts: By run id.
    """

    def __init__(self, worker: WorkerProcess, log: Log) -> None:
        self._worker = worker
        self._log = log
        self.verdicts: dict[str, Verdict] = {}

    async def judge(self, message: run_pb2.Run) -> Verdict:
        """Returns the verdict on a run, reaching it if it was not reached before."""
        if message.id not in self.verdicts:
            self.verdicts[message.id] = await self._reach(message)
        return self.verdicts[message.id]

    def condemn(self, run: str, reason: Reason) -> Verdict:
        """Replaces a verdict, because what once suited does no longer."""
        self.verdicts[run] = Verdict((reason,))
        return self.verdicts[run]

    def least_upload_bytes(self) -> int:
        """Returns how many bytes the smallest update of an accepted run has at most; 0 if none was accepted."""
        accepted = [verdict.run for verdict in self.verdicts.values() if verdict.suits and verdict.run]
        return min((run.upload_bounds(run.version + 1)[1] for run in accepted), default=0)

    def nothing_suits(self) -> FedpeftError | None:
        """Returns why, if there were runs and not one of them suits; the run is named where there were several."""
        verdicts = self.verdicts
        if not verdicts or any(verdict.suits for verdict in verdicts.values()):
            return None
        first = next(iter(verdicts.values())).reasons[0]
        named: Callable[[str], str] = (lambda run: f"{run}: ") if len(verdicts) > 1 else (lambda _: "")
        text = "; ".join(named(run) + reason.here for run, v in verdicts.items() for reason in v.reasons)
        return type(first.error)(text)

    async def _reach(self, message: run_pb2.Run) -> Verdict:
        try:
            run = KnownRun.of(message)
            answer = await self._worker.ask({"op": "check", "run": run.as_json()})
        except NOT_ABOUT_THE_TASK:
            raise
        except FedpeftError as error:  # it cannot be read here, or the worker died of it
            return Verdict((Reason.of(error),))
        reasons = tuple(Reason(**reason) for reason in answer["reasons"])
        verdict = Verdict(reasons, run, answer["report"])
        if verdict.suits:
            self._log.info(
                "run fits this site",
                run=run.id,
                name=run.config.name,
                method=run.spec.method,
                parameters=run.spec.parameters,
                examples=verdict.examples,
            )
        return verdict
