"""Verdicts of the worker on runs, each reached once in the life of the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fedpeft.errors import ConfigInvalid, FedpeftError
from fedpeft.process.logs import Log
from fedpeft.v1 import run_pb2
from fedpeft_client.egress import message_entries
from fedpeft_client.eligibility.rules import Reason
from fedpeft_client.error_policy import NOT_ABOUT_THE_TASK
from fedpeft_client.state.bounded import BoundedDict
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.uplink.wire_checks import check_run, terms_of
from fedpeft_client.worker.handle import WorkerProcess

Report = dict[str, Any]

MOST = 256
"""Verdicts that are kept: a server may offer as many runs as it likes. One that was let go is reached again."""


@dataclass(frozen=True)
class Verdict:
    """This site's verdict on a run.

    Attributes:
        reasons: Reasons for which it does not suit; empty if it does.
        run: The run, if it suits.
        report: The worker's findings: `examples`, `classes` (examples by class), `dropped`, `model_parameters`; empty
            if the run does not suit.
        name: The run's name; empty if its description cannot be read here.
    """

    reasons: tuple[Reason, ...]
    run: KnownRun | None = None
    report: Report = field(default_factory=dict)
    name: str = ""

    @property
    def is_eligible(self) -> bool:
        """True if nothing speaks against the run."""
        return not self.reasons

    @property
    def algorithm(self) -> str:
        """The local algorithm that the run will be trained by; empty if it is plain training."""
        chosen = None if self.run is None else self.run.config.training.algorithm
        return "" if chosen is None else chosen.name

    @property
    def mechanism(self) -> str:
        """The noise that is added here to what is sent for the run; empty if that is none."""
        privacy = None if self.run is None else self.run.config.privacy
        return privacy.mechanism or "" if privacy is not None and privacy.is_of_clients else ""

    @property
    def examples(self) -> int:
        """Examples of the run's classes; 0 if it does not suit."""
        return int(self.report.get("examples", 0))


class Verdicts:
    """The verdicts on runs; the newest `MOST` of them are kept.

    Args:
        worker: The process that reaches them.
        log: Log of runs that suit.
        rank: The owner's --rank; None without one, or if nothing is trained.
        of_sums: True for a relay.

    Attributes:
        verdicts: By run id, the one that was asked for longest ago first.
    """

    def __init__(self, worker: WorkerProcess, log: Log, rank: int | None = None, *, of_sums: bool = False) -> None:
        self._worker = worker
        self._log = log
        self._rank = rank
        self._of_sums = of_sums
        self.verdicts: BoundedDict[str, Verdict] = BoundedDict(MOST)
        self._terms: dict[str, str] = {}  # of each of them, what was judged

    async def judge(self, message: run_pb2.Run) -> Verdict:
        """Returns the verdict on a run, reaching it if it was not reached before.

        A run that is offered again with another configuration, spec or backbone does not suit, whatever they are: what
        this site keeps of the run, and what it told its owner, is of the one that it knows.

        Raises:
            Internal: If the id is none that a run may have.
        """
        check_run(message)
        terms = terms_of(message)
        if message.id not in self.verdicts:
            self._put(message.id, await self._reach(message))
            self._terms[message.id] = terms
        elif self._terms.get(message.id, terms) != terms:
            text = f"run {message.id} is offered again with another configuration, spec or backbone, which never change"
            self.condemn(message.id, Reason.of(ConfigInvalid(text)))
        self.verdicts.move_to_end(message.id)
        return self.verdicts[message.id]

    def knows(self, message: run_pb2.Run) -> bool:
        """Returns True if there is a verdict on a run as it is offered."""
        return message.id in self.verdicts and self._terms.get(message.id) == terms_of(message)

    def condemn(self, run: str, reason: Reason) -> Verdict:
        """Replaces a verdict, because what once suited does no longer."""
        self._put(run, Verdict((reason,)))
        return self.verdicts[run]

    def _put(self, run: str, verdict: Verdict) -> None:
        gone = self.verdicts.put(run, verdict)
        if gone is not None:
            self._terms.pop(gone, None)

    def least_upload_bytes(self) -> int:
        """Returns how many bytes the smallest update of an accepted run sends at most; 0 if none was accepted."""
        accepted = [verdict.run for verdict in self.verdicts.values() if verdict.is_eligible and verdict.run]
        return min((message_entries.largest_update(run, run.version + 1) for run in accepted), default=0)

    def nothing_suits(self) -> FedpeftError | None:
        """Returns why, if there were runs and not one of them suits; the run is named where there were several."""
        verdicts = self.verdicts
        if not verdicts or any(verdict.is_eligible for verdict in verdicts.values()):
            return None
        first = next(iter(verdicts.values())).reasons[0]
        named: Callable[[str], str] = (lambda run: f"{run}: ") if len(verdicts) > 1 else (lambda _: "")
        text = "; ".join(named(run) + reason.local_text for run, v in verdicts.items() for reason in v.reasons)
        return type(first.error)(text)

    async def _reach(self, message: run_pb2.Run) -> Verdict:
        try:
            run = KnownRun.of(message, of_sums=self._of_sums)
            answer = await self._worker.ask({"op": "check", "run": run.as_json()})
        except NOT_ABOUT_THE_TASK:
            raise
        except FedpeftError as error:  # it cannot be read here, or the worker died of it
            return Verdict((Reason.of(error),))
        reasons = tuple(Reason(**reason) for reason in answer["reasons"])
        if reasons:
            return Verdict(reasons, name=run.config.name)  # nothing of it is needed again, and it may be large
        verdict = Verdict((), run, answer["report"], run.config.name)
        if verdict.is_eligible:
            self._log.info(
                "run fits this site",
                run=run.id,
                name=run.config.name,
                method=run.spec.method,
                parameters=run.spec.parameters,
                examples=verdict.examples,
                dropped=verdict.report.get("dropped", 0),
            )
            if why := run.ignores_rank(self._rank):
                self._log.warning("--rank has no effect on this run", run=run.id, rank=self._rank, cause=why)
        return verdict
