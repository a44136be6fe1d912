"""Execution of a study: cells in processes of their own, several at once, each failure alone, finished ones kept.

Notable: processes are forked from one that has imported everything (the standard library's fork server), so a cell
begins within a fraction of a second. What ends one, out of memory too, ends no other.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeAlias

import structlog

import fedpeft
from fedpeft.errors import DataInvalid
from fedpeft.process import durable, locks
from fedpeft.simulation.out_folder import check_apart
from fedpeft.studies.cell_process import in_environment, run_cell
from fedpeft.studies.cells import Cell, Machine, content_digest
from fedpeft.studies.files import CELL, CELLS, FAILURE, LOG, REPORT, STUDY
from fedpeft.studies.results import ended, own_report, paused
from fedpeft.studies.study_file import StudyFile

_log = structlog.get_logger(__name__)

CellWork: TypeAlias = Callable[[Cell, Machine, Path, Connection], None]
TICK_S = 1.0
"""Longest time between two calls of `Watcher.tick`."""
LEAVE_S = 5.0
"""Time that a process has to end before it is killed, seconds."""


class Watcher:
    """Listener of an execution; does nothing."""

    def planned(self, todo: int) -> None:
        """Takes the number of cells that have no results yet; those of one content count each."""

    def ended(self, done: Done) -> None:
        """Takes the end of a cell."""

    def tick(self, at_work: Sequence[AtWork]) -> None:
        """Takes the cells at work; called about once a second."""


@dataclass(frozen=True)
class Done:
    """The end of a cell.

    Attributes:
        cell: The cell.
        folder: Of its results.
        failure: Reason why there are none; empty if there are.
        seconds: Time that it took; 0 if its results were there before, or another cell's are its own.
    """

    cell: Cell
    folder: Path
    failure: str
    seconds: float


@dataclass
class AtWork:
    """A cell at work.

    Attributes:
        cell: The cell.
        folder: Of its results.
        process: The process that simulates it.
        events: Rounds that it committed arrive here.
        began: Time of `time.monotonic`.
        rounds: Committed rounds.
    """

    cell: Cell
    folder: Path
    process: ForkServerProcess
    events: Connection
    began: float = field(default_factory=time.monotonic)
    rounds: int = 0


def cells_at_once(jobs: int | None, threads: int) -> int:
    """Returns the number of cells at once: the number that is given, or as many as have a core for each thread."""
    return jobs or max(1, len(os.sched_getaffinity(0)) // threads)


def execute(
    study: StudyFile,
    cells: Sequence[Cell],
    out: Path,
    machine: Machine,
    jobs: int,
    watcher: Watcher | None = None,
    work: CellWork = run_cell,
) -> list[Done]:
    """Simulates the cells that have no results yet, several at once.

    Args:
        study: The study.
        cells: Its cells.
        out: Folder of the results; made if it is not there. Held meanwhile.
        machine: Device, threads and weights.
        jobs: Most cells at once.
        watcher: Told what happens.
        work: Work of a cell's process: a function of a module, with the arguments of `run_cell`.

    Returns:
        The end of every cell, in the order of the cells.

    Raises:
        SettingsInvalid: If that folder is in the data.
        StateInvalid: If another study writes there, or it cannot be written.
        DiskFull: If there is no room; the same study goes on where it was.
        DataInvalid: If data cannot be read.
    """
    check_apart(out, {path for cell in cells for path in (cell.train, cell.test)})
    with durable.refusals(f"writing {out}"):
        (out / CELLS).mkdir(parents=True, exist_ok=True)
    with locks.results(out, "study"):
        content_digest.cache_clear()  # data may have changed since an earlier study of this program
        keys = [cell.key(machine) for cell in cells]
        with durable.refusals(f"writing {out}"):
            _write_study(study, cells, keys, out)
        folders = {key: out / CELLS / key for key in keys}
        found: dict[str, Done] = {}
        todo: dict[str, list[Cell]] = {}  # several cells may have one content
        for key, cell in zip(keys, cells, strict=True):
            failure = _ended_before(cell, folders[key])
            if failure is None:
                todo.setdefault(key, []).append(cell)
            else:
                found[key] = Done(cell, folders[key], failure, 0.0)
        ordered = sorted(
            todo.items(), key=lambda each: study.seeds.index(each[1][0].seed)
        )  # a whole picture early, its intervals later
        watcher = watcher or Watcher()
        watcher.planned(sum(map(len, todo.values())))
        for done in _executed([(of[0], folders[key]) for key, of in ordered], machine, jobs, watcher, work):
            found[done.folder.name] = done
            for cell in todo[done.folder.name]:
                watcher.ended(_end_of(cell, done))
    return [_end_of(cell, found[key]) for key, cell in zip(keys, cells, strict=True)]


def _end_of(cell: Cell, done: Done) -> Done:
    """Returns the end of a cell, which is that of the one that was computed for it: the cell, or one of its content."""
    return done if cell is done.cell else replace(done, cell=cell, seconds=0.0)


def _ended_before(cell: Cell, folder: Path) -> str | None:
    """Returns why a cell that ended earlier has no results, empty if it has; None if it is to be computed.

    A report that cannot be read, or is not the cell's, is removed, for its cell is computed again. Its adapter and
    records may be away: results are kept without them.
    """
    if not (folder / REPORT).exists():
        return None
    try:
        return paused(own_report(folder, cell.config))
    except DataInvalid as error:
        _log.warning("a report is damaged; its cell is computed again", fault=error.message)
        with durable.refusals(f"removing {folder / REPORT}"):
            (folder / REPORT).unlink()
        return None


def _executed(
    todo: Sequence[tuple[Cell, Path]], machine: Machine, jobs: int, watcher: Watcher, work: CellWork
) -> Iterator[Done]:
    """Yields the end of every cell, as they end."""
    waiting = list(todo)
    with _processes() as at_work:
        while waiting or at_work:
            while waiting and len(at_work) < jobs:
                at_work.append(_begin(*waiting.pop(0), machine, work))
            wait([each.events for each in at_work], TICK_S)
            for each in list(at_work):
                if (done := _taken(each)) is not None:
                    at_work.remove(each)
                    yield done
            watcher.tick(at_work)


@contextmanager
def _processes() -> Iterator[list[AtWork]]:
    """Yields a list of cells at work; those that are in it at the end are stopped."""
    at_work: list[AtWork] = []
    try:
        yield at_work
    finally:
        for each in at_work:
            each.process.terminate()
        for each in at_work:
            each.process.join(LEAVE_S)
            if each.process.is_alive():
                each.process.kill()
                each.process.join()


def _begin(cell: Cell, folder: Path, machine: Machine, work: CellWork) -> AtWork:
    said = {
        "label": cell.label,
        "points": dict(cell.points),
        "seed": cell.seed,
        "data": cell.data,
        "version": fedpeft.__version__,
        **cell.content(machine),
        "run": cell.config.model_dump(mode="json", exclude={"name"}),
    }
    with durable.refusals(f"writing {folder}"):
        folder.mkdir(exist_ok=True)
        (folder / FAILURE).unlink(missing_ok=True)
        durable.write_text(folder / CELL, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
    return AtWork(cell, folder, *start(cell, machine, folder, work))


def start(cell: Cell, machine: Machine, folder: Path, work: CellWork) -> tuple[ForkServerProcess, Connection]:
    """Starts the process of a cell; returns it, and where the numbers of its committed rounds arrive."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedpeft.studies.cell_process", "fedpeft.simulation"])
    ours, theirs = context.Pipe(duplex=False)
    # The fork server has the environment of the program's first study.
    arguments = dict(os.environ), work, cell, machine, folder, theirs
    process = context.Process(target=in_environment, args=arguments, daemon=False)
    process.start()
    theirs.close()
    return process, ours


def _taken(each: AtWork) -> Done | None:
    """Takes what a cell at work reported; returns its end, once its process has ended."""
    try:
        while each.events.poll():
            each.rounds = each.events.recv()
    except EOFError:
        each.process.join()  # its end of the pipe is closed: it ends, or was killed
    else:
        return None
    each.events.close()
    seconds = time.monotonic() - each.began
    return Done(each.cell, each.folder, _failure(each), seconds)


def _failure(each: AtWork) -> str:
    """Returns the reason why a cell that ended has no results; empty if it has."""
    if not (each.folder / REPORT).exists() and not (each.folder / FAILURE).exists():
        code = each.process.exitcode
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
        said = f"its process {how}; {each.folder / LOG} has its last words"
        with durable.refusals(f"writing {each.folder}"):
            durable.write_text(each.folder / FAILURE, json.dumps({"message": said}) + "\n")
    return ended(each.folder)


def _write_study(study: StudyFile, cells: Sequence[Cell], keys: Sequence[str], out: Path) -> None:
    """Leaves what the report needs to know of a study besides its cells' results."""
    rows = [
        {"key": key, "points": dict(cell.points), "seed": cell.seed, "data": cell.data, "label": cell.label}
        for key, cell in zip(keys, cells, strict=True)
    ]
    occurring = {point for cell in cells for point in cell.points.items()}
    said: Mapping[str, Any] = {
        "name": study.name,
        "title": study.title,
        "question": study.question,
        "target": study.target,
        "budgets_bytes": list(study.budgets_bytes),
        "axes": {
            axis: [point for point in points if (axis, point) in occurring] for axis, points in study.axes.items()
        },
        "cells": rows,
    }
    durable.write_text(out / STUDY, json.dumps(said, indent=2, ensure_ascii=False) + "\n")
