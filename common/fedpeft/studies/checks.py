"""Checks of all cells before the first one runs: what would fail after hours is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft.config import RunConfig
from fedpeft.errors import FedpeftError
from fedpeft.rounds.combinations import check_combination
from fedpeft.simulation import check_clients, clients_of
from fedpeft.simulation.engines import engine_named
from fedpeft.studies.cells import Cell
from fedpeft.training.run_spec import spec_without_weights

DIVISION = {"clients", "partition", "alpha", "variant", "shards", "column", "examples"}
"""Fields of `[simulation]` that divide the data, and say nothing of the clients' work on it."""


def check_cells(cells: Sequence[Cell]) -> None:
    """Builds every cell's adapter spec and divides its data, without weights and without decoding an image.

    Raises:
        ConfigInvalid: If parts of a run do not work with each other, or a round wants more clients than there are.
        DataInvalid: If its data cannot be read, or are too few to be divided so.
        ModelInvalid: If there is no such model.
    """
    specs, divisions = set[str](), set[str]()
    for cell in cells:
        config = cell.config
        try:
            if (built := config.model_dump_json(exclude={"simulation": DIVISION, "rounds": {"seed"}})) not in specs:
                _check_run(config)
                specs.add(built)
            if (divided := division_key(cell)) not in divisions:
                check_clients(config, clients_of(cell.train, config)[0])
                divisions.add(divided)
        except FedpeftError as error:
            raise type(error)(f"{cell.label}: {error.message}", error.fields) from None


def _check_run(config: RunConfig) -> None:
    if config.simulation is not None:
        engine_named(config.simulation.engine)
    check_combination(config, spec_without_weights(config))


def division_key(cell: Cell) -> str:
    """Returns all of a cell that decides how its data are divided, and how many clients a round wants."""
    said = cell.config.model_dump_json(
        include={"model": {"name", "classes", "task"}, "rounds": True, "simulation": True}
    )
    return f"{cell.train} {said}"
