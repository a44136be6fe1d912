"""Cells of a study over a network: a real server and real agents on this machine, a process each.

Every client has its part of the data in a folder of its own, as `fedpeft partition` writes it, or had it before, and
the evaluator has the held-out examples. Rounds wait for all clients, as a simulation does, so the adapter has the bits
of the simulation.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedpeft.api import views
from fedpeft.api.following import follow
from fedpeft.api.narration import Narrator
from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.data.division import drawn_rows
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import Partition
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid, TrainingFailed
from fedpeft.process import durable, output
from fedpeft.process.race import first_of
from fedpeft.simulation.clients import division_of, division_record
from fedpeft.simulation.local_trainer import HELD_OUT_SEED
from fedpeft.studies.cell_process import in_log
from fedpeft.studies.cells import Cell, Machine
from fedpeft.studies.divisions import Divisions
from fedpeft.studies.files import RECORDS, REPORT
from fedpeft_operator.cli.run.commands import shown_run
from fedpeft_operator.cli.run.create import created
from fedpeft_operator.cli.session import Session
from fedpeft_operator.federation.local_server import FOR_PEOPLE, serve
from fedpeft_operator.federation.process_group import ProcessGroup

PLACE = "network"
"""Folder of a cell that has the server's data, the clients' and the logs; removed when the cell succeeds."""
SERVER, EVALUATOR = "server", "evaluator"
"""Names of the processes beside the clients."""
LOOK_PAUSE_S = 0.5


def run_cell_over_network(cell: Cell, machine: Machine, folder: Path, events: Connection) -> None:
    """Holds a cell's run with a server and agents; as `fedpeft.studies.cell_process.run_cell`."""
    with in_log(folder):
        asyncio.run(Federation(cell, machine, folder).hold(events))


class Federation:
    """The federation of one cell."""

    def __init__(self, cell: Cell, machine: Machine, folder: Path) -> None:
        self._cell = cell
        self._machine = machine
        self._folder = folder
        self._place = folder / PLACE
        self._divided = cell.config.simulation or SimulationConfig()

    async def hold(self, events: Connection) -> None:
        """Holds the run, and leaves what a simulation leaves."""
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir()
        clients, division = self.clients()
        if taken := sorted({SERVER, EVALUATOR} & clients.keys()):
            raise DataInvalid(f"a client is named {taken[0]!r}, like another process of the run; rename its data")
        threads = str(self._machine.threads)
        async with ProcessGroup(self._place / "logs", {"OMP_NUM_THREADS": threads}) as processes:
            session = Session((await serve(processes, self._place / "server"))[0], insecure=True)
            for name, data in clients.items():
                self._start(processes, session, name, data)
            if self._cell.test is not None:
                self._start(processes, session, EVALUATOR, self._held_out(self._cell.test), "--evaluate")
            config = _for_all(self._cell.config, len(clients))
            run = await first_of(created(session, config, self._machine.weights), processes.watch())
            await first_of(completed(session, run.id, events.send), processes.watch())
            report = await first_of(reported(session, run.id, scored=self._cell.test is not None), processes.watch())
            async with session.client() as server:
                await server.download(run.id, self._folder / "adapter.safetensors")
                rounds = await server.rounds(run.id)
        durable.write_text(self._folder / RECORDS, "".join(f"{each.record}\n" for each in rounds if each.record))
        report["partition"] = division
        durable.write_text(self._folder / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        shutil.rmtree(self._place, ignore_errors=True)

    def clients(self) -> tuple[Mapping[str, Path], dict[str, Any] | None]:
        """Returns the data of each client by name, and what the report says of the division.

        Clients that are folders have them; of one data set that is divided, every part is written.
        """
        if folders := Divisions().folders(self._cell):
            return folders, None
        source = open_source(self._cell.train, self._divided.image_column, self._divided.label_column)
        split = division_of(self._divided).of(source, self._cell.seed)
        image, label = self._divided.image_column, self._divided.label_column
        out = self._place / "clients"
        record = write_parts(self._cell.train, split, out, source=source, image=image, label=label)
        return {each["name"]: out / each["name"] for each in record["clients"]}, division_record(source, split)

    def _held_out(self, path: Path) -> Path:
        """Returns the held-out data: all of it, or an index of so many examples."""
        if self._divided.held_out is None:
            return path
        source = open_source(path, self._divided.image_column, self._divided.label_column)
        rows = drawn_rows(len(source), self._divided.held_out, HELD_OUT_SEED)
        part = Partition((rows,), ("held-out",), "held-out")
        write_parts(path, part, self._place / "held-out", index=True, source=source)
        return self._place / "held-out" / "held-out.index.json"

    def _start(self, processes: ProcessGroup, session: Session, name: str, data: Path, *flags: str) -> None:
        machine = self._machine
        given: Mapping[str, object | None] = {
            "--server": session.server,
            "--name": name,
            "--data": f"{task}:{data}" if (task := self._cell.config.model.task) else data,
            "--state-dir": self._place / "state" / name,
            "--threads": machine.threads,
            "--device": machine.device,
            "--weights": machine.weights,
            "--image-column": self._divided.image_column,
            "--label-column": self._divided.label_column,
        }
        arguments = [text for flag, value in given.items() if value is not None for text in (flag, str(value))]
        processes.start(name, ["-m", "fedpeft_client", *arguments, *FOR_PEOPLE, *flags])


async def completed(session: Session, run: str, committed: Callable[[int], None]) -> None:
    """Follows a run until it is completed, line by line.

    Args:
        session: The server.
        run: Id of the run.
        committed: Told of the number of each new version.

    Raises:
        TrainingFailed: If it waits for what only a person could change; nobody looks at a run of a study.
    """
    narrator, version = Narrator(), 0
    async for snapshot in follow(session.client, run):
        if snapshot.run.version > version:
            committed(version := snapshot.run.version)
        for line in narrator.lines(snapshot):
            output.say(line)
        _check(views.run_json(snapshot.run, [], None))


async def reported(session: Session, run: str, *, scored: bool) -> views.Json:
    """Returns a completed run, `scored` once all its versions are: the evaluator scores the newest first.

    Raises:
        TrainingFailed: If a version cannot be scored.
    """
    while True:
        report = await shown_run(session, run)
        versions = [report["initial_metrics"], *(row["metrics"] for row in report["rounds"])]
        if not scored or all(map(views.is_scored, versions)):
            return report
        _check(report)
        await asyncio.sleep(LOOK_PAUSE_S)


def _check(report: views.Json) -> None:
    """Checks that a run goes on by itself: it is not paused, no client declined it, and no version was given up."""
    if report["state"] in ("paused", "stopped"):
        why = report["reason"] or "no reason given"
        raise TrainingFailed(f"the run is {report['state']} after round {report['version']}: {why}")
    for each in report["declines"]:
        raise TrainingFailed(f"{each['client']} declined the run: {'; '.join(each['reasons'])}")
    for line in chain.from_iterable(map(views.failed_lines, report["evaluators"])):
        raise TrainingFailed(line)


def _for_all(config: RunConfig, clients: int) -> RunConfig:
    """Returns a run whose rounds open once every client is there: a simulation's are there from the beginning."""
    rounds = config.rounds.model_copy(update={"min_available": clients})
    return config.model_copy(update={"rounds": rounds})
