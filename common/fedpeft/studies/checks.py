"""Checks of all cells before the first one runs: what would fail after hours is refused at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig, SimulationConfig
from fedpeft.config.simulation import DIVISION
from fedpeft.data.division import drawn_rows
from fedpeft.errors import ConfigInvalid, DataInvalid, FedpeftError, SettingsInvalid
from fedpeft.models.backbones import Backbone, skeleton
from fedpeft.models.checkpoints import resolve_weights
from fedpeft.models.tasks import task_of
from fedpeft.simulation import check_clients, check_run
from fedpeft.simulation.local_trainer import HELD_OUT_SEED, naming
from fedpeft.studies.cells import Cell, Machine
from fedpeft.studies.divisions import Divisions, place_key, task_for
from fedpeft.training.devices import device_of


def check_cells(cells: Sequence[Cell], machine: Machine) -> None:
    """Builds every cell's adapter spec and opens and divides its data, without weights and without decoding an image.

    Args:
        cells: The cells.
        machine: The machine that is to hold them.

    Raises:
        ConfigInvalid: If parts of a run do not work with each other, or a round wants more clients than there are.
        DataInvalid: If training or held-out data cannot be read, do not fit the classes, or are too few to be divided.
        ModelInvalid: If there is no such model, or no such file of weights.
        SettingsInvalid: If there is no such device, or no cell has a use for the weights that are given.
    """
    device_of(machine.device)
    if machine.weights is not None and all(cell.config.model.weights == "none" for cell in cells):
        raise SettingsInvalid(f'weights {machine.weights} would not be used: every cell says model.weights = "none"')
    checks = _Checks(machine)
    for cell in cells:
        try:
            checks.check(cell)
        except FedpeftError as error:
            raise type(error)(f"{cell.label}: {error.message}", error.fields) from None


class _Checks:
    """Checks of cells, each of them made once for all cells that it is the same for."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._divisions = Divisions()
        self._passed = set[tuple[Any, ...]]()
        self._usable: dict[tuple[Any, ...], bool] = {}

    def check(self, cell: Cell) -> None:
        """Checks a cell; raises as `check_cells`."""
        config = cell.config
        if self._is_new("run", config.model_dump_json(exclude={"simulation": set(DIVISION), "rounds": {"seed"}})):
            check_run(config, self._machine.device, is_simulated=not self._machine.over_network)
        if self._is_new("weights", config.model.weights):
            resolve_weights(config.model.weights, self._machine.weights)
        if self._machine.over_network and config.model.task:
            self._check_other_task(cell)
        of_clients = config.model_dump_json(
            include={"rounds": True, "aggregation": True, "training": {"algorithm"}}, exclude={"rounds": {"seed"}}
        )
        if self._is_new("clients", self._divisions.key(cell), of_clients):
            clients = self._divisions.folders(cell) or self._divisions.of(cell)
            check_clients(config, dict.fromkeys(clients, cell.train))
        self._check_training_data(cell)
        if cell.test is not None:
            self._check_held_out_data(cell.test, config)

    def _is_new(self, *what: Any) -> bool:
        """Returns True the first time that it is asked for something."""
        new = what not in self._passed
        self._passed.add(what)
        return new

    def _check_other_task(self, cell: Cell) -> None:
        """Refuses what agents could not be given: parts of data are written for the task of images alone."""
        held_out = (cell.config.simulation or SimulationConfig()).held_out
        if not self._divisions.folders(cell):
            raise ConfigInvalid("over a network, data of another task than images are folders of clients; divide them")
        if cell.test is not None and held_out is not None:
            text = "over a network, all held-out data of another task than images are scored; leave it out"
            raise ConfigInvalid(f"simulation.held_out: {text}", (("simulation.held_out", text),))

    def _check_training_data(self, cell: Cell) -> None:
        """Opens the data of every client as its task does; of a data set that is divided, all rows at once if it can.

        Raises:
            DataInvalid: If a client's data cannot be read, or have classes that are not the run's, with the client.
        """
        config, folders = cell.config, self._divisions.folders(cell)
        data = (bool(folders), *place_key(cell.train, config), _fit(config))
        if data not in self._usable:
            self._usable[data] = _are_usable(folders, config) if folders else self._is_usable(cell)
        if not self._usable[data] and self._is_new("parts", self._divisions.key(cell), _fit(config)):
            task, source, empty = task_for(config), self._divisions.source(cell.train, config), _empty(config)
            for name, rows in self._divisions.parts(cell).items():
                with naming(name):
                    task.dataset(task.select(source, rows), empty, {}, 0)

    def _is_usable(self, cell: Cell) -> bool:
        """Returns False if a row cannot be used; that may be one that no client has."""
        try:
            task_for(cell.config).dataset(self._divisions.source(cell.train, cell.config), _empty(cell.config), {}, 0)
        except DataInvalid:
            return False
        return True

    def _check_held_out_data(self, path: Path, config: RunConfig) -> None:
        """Opens held-out data as a simulation does; raises `DataInvalid` as that does."""
        held_out = (config.simulation or SimulationConfig()).held_out
        if not self._is_new("test", *place_key(path, config), _fit(config), held_out):
            return
        task = task_for(config)
        try:
            source: Any = self._divisions.source(path, config)
            if held_out is not None:
                source = task.select(source, drawn_rows(len(source), held_out, HELD_OUT_SEED))
            task.dataset(source, _empty(config), {}, 0)
        except DataInvalid as error:
            raise DataInvalid(f"evaluation data {path}: {error.message}") from None


def _are_usable(folders: Mapping[str, Path], config: RunConfig) -> bool:
    """Opens the data of clients that are folders; raises `DataInvalid`, with the client, if they cannot be used."""
    task, empty = task_for(config), _empty(config)
    for name, path in folders.items():
        with naming(name):
            task.dataset(task.read(path), empty, {}, 0)
    return True


def _fit(config: RunConfig) -> str:
    """Returns all of a run's model, beside the task, that decides which data it takes."""
    return config.model.model_dump_json(include={"classes", "options"})


def _empty(config: RunConfig) -> Backbone:
    """Returns the backbone of a run without values."""
    module, structure = skeleton(config.model)
    return Backbone(config.model, module, structure, task_of(config.model.task).images(module, config.model), {})
