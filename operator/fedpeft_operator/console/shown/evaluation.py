"""Progress of the evaluators of a run, and the figures of the version that was scored last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.feeds.facts import RoundFacts


@dataclass(frozen=True, slots=True)
class Evaluator:
    """An evaluator that takes part in a run.

    Attributes:
        id: Its id.
        now: Its work for the run: it scores a version, is to score one next, or has nothing left.
        is_scoring: True while it scores a version.
        scored: Versions that it scored.
        backlog: Versions that it has still to score.
        failed: The versions that it could not score and why, newest first.
    """

    id: str
    now: str
    is_scoring: bool
    scored: int
    backlog: int
    failed: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The evaluation of a run.

    Attributes:
        last: The figures of the newest version that has any, in a sentence; empty if none has.
        newest: The newest version of the run.
        evaluators: By id.
    """

    last: str
    newest: int
    evaluators: tuple[Evaluator, ...]


def evaluation(run: run_pb2.Run, rounds: Sequence[RoundFacts]) -> Evaluation:
    """Returns what a run's page shows of its evaluation."""
    rows = views.evaluators(run)
    return Evaluation(_last(run, rounds), run.version, tuple(_evaluator(row) for row in rows))


def _evaluator(row: views.Json) -> Evaluator:
    now, following = row["scoring_version"], row["next_version"]
    if now is not None:
        words = f"scoring version {now}"
    elif following is not None:
        words = f"to score version {following} next"
    else:
        words = "nothing left to score"
    failed = tuple((bad["version"], bad["reason"]) for bad in row["failed"])
    return Evaluator(row["evaluator"], words, now is not None, row["scored"], row["backlog"], failed)


def _last(run: run_pb2.Run, rounds: Sequence[RoundFacts]) -> str:
    versions = [(0, dict(run.initial_metrics)), *((facts.number, facts.metrics) for facts in rounds)]
    number, metrics = next(((n, m) for n, m in reversed(versions) if views.is_scored(m)), (0, {}))
    said = []
    if "accuracy" in metrics:
        said.append(f"accuracy {formatting.percent(metrics['accuracy'])}")
    if "loss" in metrics:
        said.append(f"loss {metrics['loss']:.3f}")
    if not said:
        return ""
    on = f" on {formatting.counted(round(metrics['examples']), 'example')}" if "examples" in metrics else ""
    return f"Version {number}: {', '.join(said)}{on}."
