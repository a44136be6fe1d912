"""Divisions of the data of cells among clients: each data set is opened once, and each division is made once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.config.simulation import DIVISION
from fedpeft.data.partition_writer import file_names
from fedpeft.models.tasks import Task, task_of
from fedpeft.simulation import clients_of, reading_of
from fedpeft.simulation.clients import Data, clients_there, division_of, place_of
from fedpeft.simulation.local_trainer import naming
from fedpeft.studies.cells import Cell


class Divisions:
    """The clients of cells. Data sets stay open; the folders of clients, which may be many, do not."""

    def __init__(self) -> None:
        self._sources: dict[tuple[Any, ...], Data] = {}
        self._folders: dict[tuple[Any, ...], dict[str, Path]] = {}
        self._parts: tuple[str, dict[str, Any]] | None = None  # of the last division: all of them would fill the memory
        self._sizes: dict[str, Mapping[str, int]] = {}

    @staticmethod
    def key(cell: Cell) -> str:
        """Returns all of a cell that decides how its data are divided."""
        config = cell.config
        said = (config.simulation or SimulationConfig()).model_dump_json(include=set(DIVISION))
        return f"{_kind(cell)} {said} {cell.seed}"

    def of(self, cell: Cell) -> Mapping[str, int]:
        """Returns the number of each client's examples, by its name.

        Raises:
            DataInvalid: If the data cannot be read, or not be divided so.
            ConfigInvalid: If there is one data set and no `[simulation]`.
        """
        folders = self.folders(cell)
        if (key := str(_kind(cell)) if folders else self.key(cell)) not in self._sizes:
            self._sizes[key] = _sizes_of(folders, cell.config) if folders else self._divided(cell)
        return self._sizes[key]

    def folders(self, cell: Cell) -> Mapping[str, Path]:
        """Returns the clients that are folders already, by name; none where one data set is divided. Raises as `of`."""
        if (key := _kind(cell)) not in self._folders:
            self._folders[key] = clients_there(place_of(cell.train, cell.config), cell.config)
            if not self._folders[key] and cell.config.simulation is None:
                clients_of(cell.train, cell.config)  # says what is missing
        return self._folders[key]

    def source(self, path: Path, config: RunConfig) -> Data:
        """Returns a data set, opened as a simulation of the run does; raises `DataInvalid` if that cannot be."""
        if (key := place_key(path, config)) not in self._sources:
            self._sources[key] = task_for(config).read(place_of(path, config))
        return self._sources[key]

    def parts(self, cell: Cell) -> dict[str, Any]:
        """Returns the rows of each client of a data set that is divided, int64[n], by its name."""
        if self._parts is None or self._parts[0] != self.key(cell):
            assert cell.config.simulation is not None  # or `folders` had raised
            split = division_of(cell.config.simulation).of(self.source(cell.train, cell.config), cell.seed)
            self._parts = self.key(cell), dict(zip(file_names(split.names), split.parts, strict=True))
        return self._parts[1]

    def _divided(self, cell: Cell) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.parts(cell).items()}


def task_for(config: RunConfig) -> Task:
    """Returns the task of a run, with the settings of reading images that the run has."""
    return task_of(config.model.task).reading(reading_of(config))


def place_key(path: Path, config: RunConfig) -> tuple[Any, ...]:
    """Returns all of a run that decides how data are opened, and their place."""
    return path, config.model.task, reading_of(config)


def _kind(cell: Cell) -> tuple[Any, ...]:
    """Returns all of a cell that decides which folders in its data are clients."""
    simulated = cell.config.simulation
    return *place_key(cell.train, cell.config), simulated is None, simulated is not None and simulated.divides


def _sizes_of(folders: Mapping[str, Path], config: RunConfig) -> dict[str, int]:
    task, sizes = task_for(config), {}
    for name, path in folders.items():
        with naming(name):
            sizes[name] = len(task.read(path))
    return sizes
