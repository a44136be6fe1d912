"""The process of one cell: its simulation, with what it writes in a log of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft.errors import FedpeftError
from fedpeft.process import durable
from fedpeft.studies.cells import Cell, Machine
from fedpeft.studies.files import FAILURE, LOG

if TYPE_CHECKING:
    from fedpeft.studies.cell_trackers import CellTrackers


def in_environment(environment: Mapping[str, str], work: Callable[..., None], *arguments: object) -> None:
    """Does the work of a cell with the environment of the study's process."""
    os.environ.clear()
    os.environ.update(environment)
    work(*arguments)


def run_cell(
    cell: Cell, machine: Machine, folder: Path, events: Connection, trackers: CellTrackers | None = None
) -> None:
    """Simulates a cell into its folder, and leaves a sentence in failure.json if that cannot be.

    Args:
        cell: The cell.
        machine: Device, threads and weights.
        folder: Of its results; it exists.
        events: The number of committed rounds is sent here after each.
        trackers: Trackers of the study, if it has any.
    """
    with in_log(folder):
        _simulate(cell, machine, folder, events, trackers)


@contextmanager
def in_log(folder: Path) -> Iterator[None]:
    """Sends what the process of a cell writes into its log; ends the process with a sentence if the block raises one.

    Ctrl-C reaches the whole group: it is passed over here, because the study's process ends this one. Where that one is
    killed outright, this one ends too: it would hold the folder of its cell, and the study could not go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    try:
        yield
    except FedpeftError as error:
        failed = {"error": type(error).__name__, "message": error.message}
        durable.write_text(folder / FAILURE, json.dumps(failed, ensure_ascii=False) + "\n")
        sys.exit(1)


def _end_with_parent() -> None:
    """Ends this process as soon as the one that began it is gone, as SIGKILL would."""
    if (parent := parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _simulate(cell: Cell, machine: Machine, folder: Path, events: Connection, trackers: CellTrackers | None) -> None:
    import torch

    from fedpeft import extensions, simulation

    extensions.load()  # the registries were filled before this study's modules were known
    torch.set_num_threads(machine.threads)
    clients, partition = simulation.clients_of(cell.train, cell.config)
    with nullcontext() if trackers is None else trackers.of(cell, folder) as tracking:
        simulation.simulate(
            cell.config,
            clients,
            folder,
            cell.test,
            machine.weights,
            device=machine.device,
            partition=partition,
            resumed=events.send,
            committed=lambda row: events.send(row["version"]),
            tracking=tracking,
        )
