"""Committed rounds as rows of text, for every table of them: on a terminal, in a notebook, of a server or simulated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpeft.api import views
from fedpeft.formatting import percent, size
from fedpeft.v1 import run_pb2

COLUMNS = ("round", "clients", "accuracy", "loss", "train loss", "up", "down", "full fine-tuning", "seconds")


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """The figures of a committed round that tables show.

    Attributes:
        number: Of the round.
        clients: Clients whose updates were folded.
        metrics: `accuracy` (0 to 1), `loss`, `train_loss`, where they are known.
        up: Bytes from the clients.
        down: Bytes to the clients.
        full: Bytes that full fine-tuning would have sent each way; 0 if that is not known.
        seconds: From the first ticket to the commit, if that is known.
    """

    number: int
    clients: int
    metrics: Mapping[str, float]
    up: int
    down: int
    full: int
    seconds: float | None

    def cells(self, columns: Sequence[str] = COLUMNS) -> tuple[str, ...]:
        """Returns the text of some columns; a dash stands for what is not known."""
        text = {
            "round": str(self.number),
            "clients": str(self.clients),
            "accuracy": percent(self.metrics.get("accuracy")),
            "loss": _loss(self.metrics, "loss"),
            "train loss": _loss(self.metrics, "train_loss"),
            "up": size(self.up),
            "down": size(self.down),
            "full fine-tuning": size(self.full) if self.full else "-",
            "seconds": "-" if self.seconds is None else f"{self.seconds:.1f}",
        }
        return tuple(text[column] for column in columns)


def of_message(round_: run_pb2.Round, run: run_pb2.Run) -> RoundFigures:
    """Returns the figures of a committed round of a server; bytes are those of whole messages."""
    clients = len(views.counted(round_))
    full, took = views.full_bytes(run, clients), views.seconds(round_)
    up, down = round_.wire_bytes_up, round_.wire_bytes_down
    return RoundFigures(round_.number, clients, round_.metrics, up, down, full, took)


class CommittedFigures:
    """Figures of the committed rounds of a run that is watched, each made once: that looks at every ticket."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[run_pb2.Round, RoundFigures]] = {}

    def of(self, rounds: Iterable[run_pb2.Round], run: run_pb2.Run) -> list[RoundFigures]:
        """Returns the figures of these rounds; those of a message that was given before are not made again."""
        before, self._made = self._made, {}
        for each in rounds:
            known = before.get(each.number)
            self._made[each.number] = known if known and known[0] is each else (each, of_message(each, run))
        return [figures for _, figures in self._made.values()]


def of_json(row: Mapping[str, Any], counted: str = "wire") -> RoundFigures:
    """Returns the figures of a round of `run show --json` or of a simulation's report.

    Args:
        row: The round.
        counted: Bytes that are meant, `wire` or `payload`.
    """
    up, down = row[f"{counted}_bytes_up"], row[f"{counted}_bytes_down"]
    full = row["full_bytes_each_way"]
    return RoundFigures(row["version"], len(row["clients"]), row["metrics"], up, down, full, row["seconds"])


def _loss(metrics: Mapping[str, float], name: str) -> str:
    return f"{metrics[name]:.3f}" if name in metrics else "-"
