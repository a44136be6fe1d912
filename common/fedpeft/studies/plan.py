"""The plan of a study: cells, bytes and time before anything runs, from one short round of each kind of cell.

A kind is a run file without its rounds, seed and division of data: one client of it is trained for one round, or as
many as `AT_ONCE` where its engine trains several at once. Every figure is taken from that round. Bytes are exact for
dense encodings; what a sparse one leaves out depends on the values.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig, SimulationConfig, TrainingConfig
from fedpeft.errors import TrainingFailed
from fedpeft.models.tasks import task_of
from fedpeft.rounds.screening import local_steps
from fedpeft.simulation import clients_of, reading_of
from fedpeft.studies.cell_process import run_cell
from fedpeft.studies.cells import Cell, Machine
from fedpeft.studies.checks import DIVISION, division_key
from fedpeft.studies.execution import start
from fedpeft.studies.files import CELLS, REPORT
from fedpeft.studies.results import ended

AT_ONCE = 16
"""Most clients of the round that is timed, where the engine trains several at once."""


@dataclass(frozen=True)
class Kind:
    """Measurements of one kind of cell.

    Attributes:
        start_s: Seconds until the first round begins, and after the last.
        example_s: Seconds of training for one example, each time that it is trained on.
        score_s: Seconds of scoring one version.
        bytes_up: Payload bytes of one update.
        bytes_down: Payload bytes of one version.
    """

    start_s: float
    example_s: float
    score_s: float
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class CellPlan:
    """Expectations of a cell.

    Attributes:
        cell: The cell.
        done: True if its results are there already.
        seconds: Time of its simulation.
        bytes_up: Payload bytes of all clients in all rounds.
        bytes_down: Likewise; an upper bound, because a client that holds a version's bytes is sent none.
    """

    cell: Cell
    done: bool
    seconds: float
    bytes_up: int
    bytes_down: int


def plan_of(
    cells: Sequence[Cell], out: Path | None, machine: Machine, timed: Callable[[Cell], None] | None = None
) -> list[CellPlan]:
    """Returns what every cell will take.

    Args:
        cells: All cells, checked.
        out: Folder of results that may be there already.
        machine: Device, threads and weights.
        timed: Told of each cell that is about to be timed.

    Raises:
        TrainingFailed: If the round that is timed fails, with its reason.
    """
    kinds: dict[str, Kind] = {}
    sizes: dict[str, float] = {}
    found = []
    for cell in cells:
        key = f"{cell.train} {cell.test} {_kind_of(cell.config)}"
        if key not in kinds:
            if timed is not None:
                timed(cell)
            kinds[key] = _measured(cell, machine)
        done = out is not None and (out / CELLS / cell.key(machine) / REPORT).exists()
        if (division := f"{division_key(cell)} {cell.config.training.model_dump_json()}") not in sizes:
            sizes[division] = _mean_trained(cell)
        found.append(_planned(cell, kinds[key], sizes[division], done=done))
    return found


def _kind_of(config: RunConfig) -> str:
    return config.model_dump_json(exclude={"name": True, "rounds": True, "simulation": DIVISION})


def _mean_trained(cell: Cell) -> float:
    """Returns how many examples a client trains on in a round, in the mean over the clients."""
    clients = clients_of(cell.train, cell.config)[0].values()
    task = task_of(cell.config.model.task).reading(reading_of(cell.config))
    sizes = [len(task.read(data) if isinstance(data, Path) else data) for data in clients]
    return sum(_trained(size, cell.config.training) for size in sizes) / len(sizes)


def _trained(examples: int, training: TrainingConfig) -> float:
    """Returns how many examples a client that has so many trains on in a round, each counted as often as it comes."""
    batches = math.ceil(examples / training.batch_size)
    return local_steps(examples, training) * examples / batches if batches else 0.0


def _planned(cell: Cell, kind: Kind, trained: float, *, done: bool) -> CellPlan:
    rounds, clients = cell.config.rounds.count, cell.config.rounds.clients
    scored = 0 if cell.test is None else rounds + 1
    seconds = kind.start_s + rounds * clients * trained * kind.example_s + scored * kind.score_s
    return CellPlan(cell, done, seconds, rounds * clients * kind.bytes_up, rounds * clients * kind.bytes_down)


def _measured(cell: Cell, machine: Machine) -> Kind:
    """Holds the round of a cell that is timed, in a process of its own."""
    simulated = cell.config.simulation or SimulationConfig()
    clients = 1 if simulated.engine == "inprocess" else min(cell.config.rounds.clients, AT_ONCE)
    rounds = {"count": 1, "clients": clients, "quorum": None, "min_available": None, "over_selection": 0.0}
    config = cell.config.model_copy(update={"rounds": cell.config.rounds.model_copy(update=rounds)})
    with tempfile.TemporaryDirectory(prefix="fedpeft-plan-") as name:
        folder = Path(name)
        began = time.monotonic()
        process, events = start(replace(cell, config=config), machine, folder, run_cell)
        try:
            process.join()
        finally:
            process.kill()  # it passes Ctrl-C over
            process.join()
        events.close()
        wall = time.monotonic() - began
        if not (folder / REPORT).exists():
            raise TrainingFailed(f"{cell.label}: {ended(folder) or 'the process that was timed ended without a word'}")
        return _kind(json.loads((folder / REPORT).read_text()), config.training, wall)


def _kind(report: dict[str, Any], training: TrainingConfig, wall_s: float) -> Kind:
    if not report["rounds"]:
        raise TrainingFailed(f"the round that was timed ended as {report['state']}: {report['reason']}")
    (row,) = report["rounds"]
    received = [each for each in row["tickets"] if each["state"] == "received"]
    versions = 2 if report["initial_metrics"] else 0
    score_s = max(report["seconds"] - row["seconds"], 0.0) / versions if versions else 0.0
    start_s = max(wall_s - row["seconds"] - versions * score_s, 0.0)
    up, down = (round(row[f"payload_bytes_{way}"] / len(received)) for way in ("up", "down"))
    trained = sum(_trained(each["examples"], training) for each in received)
    return Kind(start_s, row["seconds"] / trained, score_s, up, down)
