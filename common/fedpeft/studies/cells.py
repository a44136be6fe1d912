"""Cells of a study: every combination of a point of each axis and a seed, with the run file that it makes.

Notable: a cell is named by its content (the run file, the bytes of its data, weights and imported modules, threads and
device), so a result is found again whatever study, name or order asks for it, and is never taken for another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from fedpeft.config import RunConfig, parse_config, with_classes
from fedpeft.config.overrides import Table, at_key, merged, united, value_of
from fedpeft.data.client_folders import classes_there, subfolders
from fedpeft.data.contents import digest_of
from fedpeft.data.sources.hub import has_split, is_hub, local_path
from fedpeft.data.sources.splits import splits_among
from fedpeft.errors import ConfigInvalid, DataInvalid
from fedpeft.simulation.content import content_of, name_of, path_digest
from fedpeft.studies.study_file import DATA, MOST_CELLS, DataSet, StudyFile
from fedpeft.training.devices import device_of


@dataclass(frozen=True)
class Machine:
    """Settings of the machine that decide a cell's bits, beside its content.

    Attributes:
        device: cpu, cuda or cuda:N; where auto is given, the device that this is here.
        threads: Of torch.
        weights: A file, or a folder of files, that stands for the weights that runs name.
        over_network: True if a server and agents hold the run, and not a simulation.
    """

    device: str = "auto"
    threads: int = 1
    weights: Path | None = None
    over_network: bool = False

    def __post_init__(self) -> None:
        if self.device == "auto":
            object.__setattr__(self, "device", str(device_of(self.device)))


@dataclass(frozen=True)
class Cell:
    """One simulation of a study.

    Attributes:
        points: Its point of each axis.
        config: Its run file.
        data: Name of its data set.
        train: Training data.
        test: Held-out data, None if versions are not scored.
    """

    points: Mapping[str, str]
    config: RunConfig
    data: str
    train: Path
    test: Path | None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config.rounds.seed

    @property
    def label(self) -> str:
        """A line for people."""
        return ", ".join([*(f"{axis}={point}" for axis, point in self.points.items()), f"seed={self.seed}"])

    def content(self, machine: Machine) -> Table:
        """Returns all that decides the result, as JSON has it."""
        content = content_of(
            self.config,
            train=content_digest(self.train),
            test=None if self.test is None else content_digest(self.test),
            weights=_weights_digest(self.config.model.weights, machine.weights),
            threads=machine.threads,
            device=machine.device,
        )
        return {**content, **({"over_network": True} if machine.over_network else {})}

    def key(self, machine: Machine) -> str:
        """Returns the name of its folder."""
        return name_of(self.content(machine))


def cells_of(
    study: StudyFile,
    places: Mapping[str, Path],
    *,
    override: Mapping[str, Any] | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
) -> list[Cell]:
    """Returns all cells, axis by axis in the order of the file, seeds last.

    Args:
        study: The study.
        places: Data sets that lie elsewhere than the file says, by name: a folder with a training and a held-out part,
            or `hub:NAME`, a data set on the hub with these splits; or training data alone, also `hub:NAME/SPLIT`,
            with which the file's held-out data stay.
        override: Fields of the run file that all cells get, over what axes say.
        only: Points of an axis that are wanted, all of its points if it is not named.

    Raises:
        ConfigInvalid: If a cell's run file is wrong, with the cell; if there is no such axis or point; if there are
            too many cells, or two are the same run.
        DataInvalid: If the data of a cell is not there, or no run can have their classes and it names none.
    """
    axes = _chosen(study, only or {})
    if (number := len(study.seeds) * math.prod(len(points) for points in axes.values())) > MOST_CELLS:
        raise ConfigInvalid(f"the study has {number:,} cells, more than {MOST_CELLS:,}; give fewer points or seeds")
    if unknown := sorted(places.keys() - study.data.keys()):
        raise ConfigInvalid(f"there is no data set {unknown[0]!r}; those of this study: {', '.join(study.data)}")
    place = cache(lambda data: _places(data, study.data[data], places.get(data)))  # once a data set, not once a cell
    classes = cache(classes_there)  # likewise
    found: list[Cell] = []
    for points in itertools.product(*([(axis, point) for point in chosen] for axis, chosen in axes.items())):
        found += _cells_at(study, dict(points), place, classes, override or {})
    _check_differ(found, overridden=bool(override))
    return found


def _check_differ(cells: Sequence[Cell], *, overridden: bool) -> None:
    """Checks that no two cells are one run on the same data: one result would stand under two names.

    Raises:
        ConfigInvalid: With the first two that are.
    """
    found: dict[str, Cell] = {}
    for cell in cells:
        run = cell.config.model_dump_json(exclude={"name"})
        divides = cell.config.simulation is not None and cell.config.simulation.divides
        other = found.setdefault(f"{cell.train} {cell.test} {run} {divides}", cell)
        if other is not cell:
            why = "what is set for all cells takes the place of what they differ in; " if overridden else ""
            raise ConfigInvalid(
                f"{other.label} and {cell.label} are the same run on the same data: {why}give one of them"
            )


def grid_axes(grids: Sequence[str]) -> dict[str, dict[str, Table]]:
    """Returns the axes that settings KEY=VALUE,VALUE make, a point for each value.

    Raises:
        ConfigInvalid: If one has no such form, or gives a value twice.
    """
    axes: dict[str, dict[str, Table]] = {}
    for grid in grids:
        key, equals, listed = grid.partition("=")
        key = key.strip()
        if not (equals and key and listed.strip()):
            raise ConfigInvalid(f"{grid!r} is no grid; give KEY=VALUE,VALUE, such as training.learning_rate=0.01,0.03")
        values = value_of(f"[{listed}]")
        if not isinstance(values, list):
            parts = [part.strip() for part in listed.split(",")]
            if "" in parts:
                raise ConfigInvalid(f"{grid!r} has a comma without a value; give KEY=VALUE,VALUE")
            values = list(map(value_of, parts))
        if key in axes:
            raise ConfigInvalid(f"{grid!r} gives a key twice")
        axes[key] = axis_of(key, values)
    return axes


_PLAIN = str.maketrans("/,=", "-;:")
"""A point's name has no character that separates points."""


def axis_of(key: str, values: Sequence[Any]) -> dict[str, Table]:
    """Returns the axis along which a field takes some values in turn, a point for each.

    Raises:
        ConfigInvalid: If it is no field's key, there is no value, or one is given twice.
    """
    points = {str(value).translate(_PLAIN): at_key(key, value) for value in values}
    if not points or len(points) != len(values):
        raise ConfigInvalid(f"axis {key!r} has {'a value twice' if points else 'no value'}")
    return points


def _chosen(study: StudyFile, only: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    axes = {axis: list(points) for axis, points in study.axes.items()}
    for axis, wanted in only.items():
        if axis not in axes:
            raise ConfigInvalid(f"there is no axis {axis!r}; the axes of this study: {', '.join(axes) or 'none'}")
        if isinstance(wanted, str) or not wanted:
            raise ConfigInvalid(
                f"only: axis {axis!r} has {wanted!r}; give a list of its points: {', '.join(axes[axis])}"
            )
        if missing := [point for point in wanted if point not in axes[axis]]:
            raise ConfigInvalid(f"axis {axis!r} has no point {missing[0]!r}; there are: {', '.join(axes[axis])}")
        axes[axis] = [point for point in axes[axis] if point in wanted]
    return axes


def _cells_at(
    study: StudyFile,
    points: Mapping[str, str],
    place: Callable[[str], tuple[Path, Path | None]],
    classes: Callable[[Path, str | None, str | None], Sequence[str]],
    override: Mapping[str, Any],
) -> list[Cell]:
    """Returns the cells of one combination of points, one a seed."""
    fields: Table = {}
    for axis, point in points.items():
        fields = united(fields, study.axes[axis][point])
    data = fields.pop(DATA, None) or study.default_data
    at = ", ".join(f"{axis}={point}" for axis, point in points.items()) or "the study"
    if data is None:
        raise ConfigInvalid(f"{at}: no data set is named, and the study has {len(study.data)}; give data_set = ...")
    train, test = place(data)
    table = merged(merged(study.run, study.data[data].run), united(fields, override))
    table = with_classes(table, partial(classes, train))
    found = []
    for seed in study.seeds:
        try:
            config = parse_config(_with_seed(table, seed))
        except ConfigInvalid as error:
            raise ConfigInvalid(f"{at}: {error.message}", error.fields) from None
        found.append(Cell(points, config, data, train, test))
    return found


def _with_seed(table: Table, seed: int) -> Table:
    """Returns a run file's tables with a seed of the study.

    Raises:
        ConfigInvalid: If they have a seed, which would have no effect.
    """
    rounds = table.get("rounds", {})
    if not isinstance(rounds, Mapping):
        return table  # the parser refuses it
    if "seed" in rounds:
        raise ConfigInvalid("rounds.seed: a study has its seeds apart; give seeds = [...], or --seed")
    return {**table, "rounds": {**rounds, "seed": seed}}


_PARTS = ("train", "test")


def _places(name: str, given: DataSet, folder: Path | None) -> tuple[Path, Path | None]:
    """Returns the training and the held-out data of a data set.

    Raises:
        DataInvalid: If they are not there, or cannot be fetched.
    """
    train, test = (given.train, given.test) if folder is None else _found(name, folder)
    if train is None:
        raise _nowhere(name, "the study file says no place for it")
    test = test or given.test
    for path in filter(None, (train, test)):
        if not is_hub(path) and not Path(path).exists():
            raise DataInvalid(f"data set {name!r}: there is no data at {path}")
    return local_path(train), None if test is None else local_path(test)


def _found(name: str, folder: Path) -> tuple[str, str | None]:
    """Returns the training data of a place that was given, and its held-out data if it has them.

    Raises:
        DataInvalid: If the place is not there, or has held-out data alone.
    """
    if is_hub(place := str(folder)):
        return (place, None) if has_split(place) else (f"{place}/train", f"{place}/test")
    if not folder.exists():
        raise _nowhere(name, f"{folder} is not there")
    train, test = (_part(folder, split) for split in _PARTS) if folder.is_dir() else (None, None)
    if test is not None and train is None:
        raise DataInvalid(f"data set {name!r}: {folder} holds {test.name} and no train.parquet; name what to train on")
    return str(train or folder), None if test is None else str(test)


def _nowhere(name: str, why: str) -> DataInvalid:
    return DataInvalid(f"data set {name!r}: {why}; give --data {name}=FOLDER, with train.parquet and test.parquet")


def _part(folder: Path, split: str) -> Path | None:
    """Returns a split of a folder: a file of it, or a folder that is no class: there are others, or splits alone."""
    if (file := folder / f"{split}.parquet").exists():
        return file
    names = [each.name for each in subfolders(folder)]
    splits = splits_among(names)
    are_splits = len(set(splits.values())) > 1 or len(splits) == len(names)
    return folder / split if split in names and are_splits else None


@cache
def content_digest(path: Path) -> str:
    """Returns the digest of data by path, see `fedpeft.simulation.content`; kept for all cells of a study.

    `content_digest.cache_clear` begins the next one.
    """
    return path_digest(path, digest_of)


def _weights_digest(named: str, given: Path | None) -> str | None:
    """Returns the digest of the weights that a run names, None for those of the hub and where none are there."""
    if named == "none":
        return None
    place = Path(named) if given is None and named != "hub" else given
    return None if place is None or not place.exists() else content_digest(place)
