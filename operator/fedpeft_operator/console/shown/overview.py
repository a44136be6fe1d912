"""Contents of the first page: every run at a glance, and the clients that are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_operator.console.feeds.disks import DiskFacts
from fedpeft_operator.console.feeds.facts import RoundFacts
from fedpeft_operator.console.shown.members import members
from fedpeft_operator.console.shown.run import Tile, head, stage
from fedpeft_operator.console.shown.series import thinned
from fedpeft_operator.console.shown.sparkline import Sparkline, sparkline

SPARKLINE_POINTS = 60
_FIGURES: dict[str, Callable[[float], str]] = {"accuracy": formatting.percent, "loss": "{:.3f}".format}
"""The figure that a version is judged by, the first that there is, and its format."""


@dataclass(frozen=True, slots=True)
class Card:
    """A run at a glance.

    Attributes:
        id: Of the run.
        name: Its label.
        state: running, paused, completed or stopped.
        about: Method and model.
        version: Newest adapter version.
        rounds: Rounds of the run.
        sentence: State of the run, or the reason for which it does not go on.
        deadline: Of the round in progress, ISO 8601.
        score: Accuracy of the newest scored version, or its loss; empty if there is none.
        scored_by: Source of the figures, one of the two; likewise.
        line: Its course.
        sent: Bytes, beside full fine-tuning.
        odd: Clients with remarks.
        aside: Clients that are set aside.
    """

    id: str
    name: str
    state: str
    about: str
    version: int
    rounds: int
    sentence: str
    deadline: str | None
    score: str
    scored_by: str
    line: Sparkline | None
    sent: str
    odd: tuple[str, ...]
    aside: tuple[str, ...]


def card(run: run_pb2.Run, snapshot: RunSnapshot | None, rounds: Sequence[RoundFacts]) -> Card:
    """Returns a run at a glance.

    Args:
        run: As it stands in the list of runs.
        snapshot: Its watch's last news; None before the first answer.
        rounds: Of the snapshot.
    """
    top = head(snapshot.run if snapshot is not None else run)
    now = stage(snapshot, rounds) if snapshot is not None else None
    by, scores = next(((by, found) for by in _FIGURES if (found := _scores(by, run, rounds))), ("", []))
    return Card(
        id=top.id,
        name=top.name,
        state=top.state,
        about=f"{top.method} on {top.model}",
        version=top.version,
        rounds=top.rounds,
        sentence=f"Round {now.number}: {now.sentence}" if now and top.state == "running" else top.reason,
        deadline=now.deadline if now and now.phase == "open" else None,
        score=_FIGURES[by](scores[-1][1]) if by else "",
        scored_by=by,
        line=sparkline(thinned(scores, SPARKLINE_POINTS)),
        sent=_sent([facts for facts in rounds if facts.is_committed]),
        odd=tuple(member.client for member in members(rounds) if member.remarks),
        aside=tuple((snapshot.run if snapshot is not None else run).set_aside),
    )


def tiles(runs: Iterable[run_pb2.Run], clients: Mapping[str, pb.Client], disks: Sequence[DiskFacts] = ()) -> list[Tile]:
    """Returns the federation in four figures, and one more for each of the server's disks."""
    states = Counter(views.state(run) for run in runs)
    roles = Counter(views.role(client) for client in clients.values())
    here = Counter(client.activity for client in clients.values())
    away = here["away"]
    busy = ", ".join(
        f"{here[activity]} {activity}" for activity in ("training", "uploading", "scoring") if here[activity]
    )
    return [
        Tile("Runs", f"{states['running']} running", f"{states['paused']} paused, {sum(states.values())} in total"),
        Tile("Clients online", f"{len(clients) - away}", f"of {len(clients)} registered"),
        Tile(
            "Active",
            f"{here['training'] + here['uploading'] + here['scoring']}",
            busy or ("all are waiting" if len(clients) > away else "no client is online"),
        ),
        Tile("Evaluators", f"{roles['evaluator']}", "score versions on held-out data"),
        *(_disk(disk) for disk in disks),
    ]


def _disk(disk: DiskFacts) -> Tile:
    name = "Disk" if disk.place == "data" else f"Disk of {disk.place}"
    said = f"of {disk.size}" + (f"; {disk.used} in use by the server" if disk.used else "")
    if disk.is_full:
        said += f"; uploads are refused, for {disk.spared} are kept for the server itself"
    return Tile(name, f"{disk.free} free", said)


def _scores(by: str, run: run_pb2.Run, rounds: Sequence[RoundFacts]) -> list[tuple[int, float]]:
    """Returns a figure of every version that has it, version 0 first."""
    first = [(0, run.initial_metrics[by])] if by in run.initial_metrics else []
    return first + [(facts.number, facts.metrics[by]) for facts in rounds if by in facts.metrics]


def _sent(committed: Sequence[RoundFacts]) -> str:
    up, full = sum(facts.up for facts in committed), sum(facts.full for facts in committed)
    if not up:
        return ""
    beside = f"; full fine-tuning {formatting.size(full)}, {formatting.as_much(full / up)}" if full else ""
    return f"{formatting.size(up)} up{beside}"
