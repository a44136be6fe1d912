"""The plan of a study: cells, bytes and time before anything runs, from one short round of each kind of cell.

A kind is a run file without its rounds, seed and division of data: one client of it is trained for one round, or as
many as `AT_ONCE` where its engine trains several at once. Every figure is taken from that round. Bytes are exact for
dense encodings; what a sparse one leaves out depends on the values.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpeft.config import RoundsConfig, RunConfig, SimulationConfig, TrainingConfig
from fedpeft.config.simulation import DIVISION
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.rounds.screening import local_steps
from fedpeft.rounds.state_machine import policy_of
from fedpeft.studies.cell_process import run_cell
from fedpeft.studies.cells import Cell, Machine
from fedpeft.studies.divisions import Divisions
from fedpeft.studies.execution import start
from fedpeft.studies.files import CELLS, REPORT
from fedpeft.studies.results import ended, load_report, own_report
from fedpeft.training.run_spec import spec_without_weights

AT_ONCE = 16
"""Most clients of the round that is timed, where the engine trains several at once."""
ALL_AT_ONCE = {"quorum": None, "min_available": None, "over_selection": 0.0, "concurrency": None}
"""Settings of a round that has the updates of all who are sampled."""
UNSCHEDULED = {"schedule": None, "warmup_rounds": None, "final_factor": None, "schedule_drops": None}
"""Settings of a learning rate that is the same in every round; one round takes as long with any."""


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
        bytes_up: Payload bytes of all updates that are counted.
        bytes_down: Those of the versions of all clients that are sampled; an upper bound, because a client that holds
            a version's bytes is sent none.
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
    uncounted: dict[str, bool] = {}
    means: dict[str, float] = {}
    divisions, found = Divisions(), []
    for cell in cells:
        key = f"{cell.train} {cell.test} {_kind_of(cell.config)}"
        if key not in kinds:
            if timed is not None:
                timed(cell)
            kinds[key] = _measured(cell, machine)
            uncounted[key] = _trains_uncounted(cell.config)
        clients = divisions.of(cell)
        if (division := f"{divisions.key(cell)} {cell.config.training.model_dump_json()}") not in means:
            means[division] = sum(_trained(size, cell.config.training) for size in clients.values()) / len(clients)
        done = out is not None and _is_done(cell, out / CELLS / cell.key(machine))
        tickets, counted = _work(cell.config.rounds, len(clients))
        trained = (tickets if uncounted[key] else counted) * means[division]
        found.append(_planned(cell, kinds[key], trained, tickets, counted, done=done))
    return found


def _is_done(cell: Cell, folder: Path) -> bool:
    """Returns True if a study would not compute the cell: what it would compute again takes time."""
    try:
        own_report(folder, cell.config)
    except DataInvalid:
        return False
    return True


def _kind_of(config: RunConfig) -> str:
    return config.model_dump_json(
        exclude={"name": True, "rounds": True, "simulation": set(DIVISION), "training": set(UNSCHEDULED)}
    )


def _trains_uncounted(config: RunConfig) -> bool:
    """Returns True if a simulation also computes updates that are not counted; see `LoadedRun.keeps_uncounted`.

    An engine that has several clients at work has begun them by then.
    """
    simulated, privacy = config.simulation or SimulationConfig(), config.privacy
    if (
        simulated.engine != "inprocess"
        or config.codec.error_feedback
        or (privacy is not None and privacy.is_of_clients)
    ):
        return True
    spec = spec_without_weights(config)
    return len(spec.shared) < len(spec.tensors)  # clients keep the others


def _work(rounds: RoundsConfig, clients: int) -> tuple[int, int]:
    """Returns how many tickets a run of so many clients gives out in all, and how many updates it counts."""
    sampled, counted = min(rounds.sampled, clients), rounds.count * min(rounds.clients, clients)
    if policy_of(rounds).one_version:
        return rounds.count * sampled, counted
    return counted + sampled - 1, counted  # each place is given away again, but for that of the last update


def _trained(examples: int, training: TrainingConfig) -> float:
    """Returns how many examples a client that has so many trains on in a round, each counted as often as it comes."""
    batches = math.ceil(examples / training.batch_size)
    return local_steps(examples, training) * examples / batches if batches else 0.0


def _planned(cell: Cell, kind: Kind, trained: float, tickets: int, counted: int, *, done: bool) -> CellPlan:
    scored = 0 if cell.test is None else cell.config.rounds.count + 1
    seconds = kind.start_s + trained * kind.example_s + scored * kind.score_s
    return CellPlan(cell, done, seconds, counted * kind.bytes_up, tickets * kind.bytes_down)


def _measured(cell: Cell, machine: Machine) -> Kind:
    """Holds the round of a cell that is timed, in a process of its own."""
    simulated = cell.config.simulation or SimulationConfig()
    clients = 1 if simulated.engine == "inprocess" else min(cell.config.rounds.clients, AT_ONCE)
    rounds = cell.config.rounds.model_copy(update={"count": 1, "clients": clients, **ALL_AT_ONCE})
    training = cell.config.training.model_copy(update=UNSCHEDULED)
    config = cell.config.model_copy(update={"rounds": rounds, "training": training})
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
        return _kind(load_report(folder), config.training, wall)


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
