"""The study file: one run file, and the axes along which a study varies it.

    name = "communication"
    base = "base.toml"                   # another study file that this one is laid over
    seeds = [0, 1, 2]

    [run.rounds]                         # a run file's tables
    count = 10

    [data.cifar10.run.model]             # fields that belong to a data set
    classes = ["airplane", "automobile"]

    [axes.method."bias"]                 # a point of an axis: fields that it sets
    peft.method = "bias"
    training.learning_rate = 0.01

    [scales.small.run.rounds]            # another size of the same study: laid over it when it is asked for
    count = 3
    [scales.small.axes.method]
    bias = false                         # a point that this size leaves out

The cells of a study are all combinations of a point of every axis and a seed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from fedpeft import text_files
from fedpeft.config import Name
from fedpeft.config.overrides import Table, merged, united
from fedpeft.config.section import Section
from fedpeft.config_errors import dotted, fault_at, faults_of, in_file, keys_there
from fedpeft.data.sources.hub import is_hub
from fedpeft.errors import ConfigInvalid

DATA = "data"
"""Key of an axis's point that names a data set; all other keys are those of a run file."""

COLUMNS = frozenset({"version", "payload_bytes", "seconds", "accuracy", "loss", "key", "failure"})
"""Columns of tables of results, beside the seed and the axes."""
MOST_CELLS = 10_000
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_UNSEEN = r"\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"
"""Characters that steer a terminal or the direction of a line."""
Label = Annotated[str, Field(min_length=1, max_length=128, pattern=rf"^[^{_UNSEEN}=,/]+$")]


def _not_empty(path: str) -> str:
    """Refuses an empty path: it would be the folder of the study file."""
    if not path:
        raise ValueError("is empty; give a path, or hub:NAME/SPLIT")
    return path


Place = Annotated[str, AfterValidator(_not_empty)]


class DataSet(Section):
    """`[data.NAME]`: a data set, and the fields of the run file that belong to it."""

    train: Place | None = None
    """Path of its training data, beside the study file, or `hub:NAME/SPLIT`; the command line may name others."""
    test: Place | None = None
    """Path of its held-out data, likewise."""
    run: dict[str, Any] = Field(default_factory=dict)
    """Fields of cells that use it, as tables of a run file."""


class StudyFile(Section):
    """A study file, with its base and a scale laid under and over it."""

    name: Name
    """A label for people."""
    title: Annotated[str, Field(max_length=256)] = ""
    """Title of the report."""
    question: Annotated[str, Field(max_length=4096)] = ""
    """Question that the study answers; stands at the head of the report."""
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1, max_length=1000)] = (0,)
    """Seeds of every combination, `rounds.seed` of its run."""
    data_set: Label | None = None
    """The data set of cells whose axes name none; the only one of `[data]` if absent."""
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    """Accuracy for which the report says the bytes and the seconds until it was reached."""
    budgets_bytes: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(strict=False, max_length=16)] = ()
    """Budgets, bytes up and down, for which the report says the accuracy that they buy."""
    data: Annotated[dict[Label, DataSet], Field(min_length=1)]
    """Data sets by name."""
    run: dict[str, Any]
    """Tables of a run file that all cells share."""
    axes: dict[Label, dict[Label, dict[str, Any]]] = Field(default_factory=dict)
    """Points of every axis by name: the fields of the run file that each sets."""

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        for axis, points in self.axes.items():
            if not points:
                raise fault_at(dotted("axes", axis), "has no point")
            if axis == "seed":
                raise fault_at("axes.seed", "no axis has this name; give seeds = [...]")
            if axis in COLUMNS:
                raise fault_at(dotted("axes", axis), "no axis has this name, which is that of a column of results")
            for point, fields in points.items():
                self._check_data(fields.get(DATA), dotted("axes", axis, point, DATA))
        self._check_data(self.data_set, "data_set")
        if len(self.seeds) != len(set(self.seeds)):
            raise fault_at("seeds", "a seed stands twice")
        return self

    def _check_data(self, name: Any, field: str) -> None:
        if name is not None and not (isinstance(name, str) and name in self.data):
            raise fault_at(field, f"is {name!r}; the data sets of this study: {', '.join(self.data)}")

    @property
    def default_data(self) -> str | None:
        """The data set of cells whose axes name none; None if there is no such."""
        return self.data_set or (next(iter(self.data)) if len(self.data) == 1 else None)

    def named(self, places: Mapping[str, Path]) -> dict[str, Path]:
        """Returns places of data sets by name, where "" stands for the only one, or that of `data_set`.

        Raises:
            ConfigInvalid: If there are several and none is named.
        """
        if "" in places and self.default_data is None:
            there = ", ".join(self.data)
            raise ConfigInvalid(f"data {places['']}: the study has several data sets; give NAME=PATH, of {there}")
        return {name or str(self.default_data): path for name, path in places.items()}


def load_study(path: Path, scale: str | None = None) -> StudyFile:
    """Reads a study file; a plain run file is a study of one cell.

    Args:
        path: The TOML file.
        scale: Name of one of its `[scales]`.

    Raises:
        ConfigInvalid: If it or its base cannot be read, breaks a rule, or has no such scale.
    """
    files = _with_bases(path)
    table = reduce(laid_over, (of for _, of in files))
    scales = table.get("scales", {})
    table = {key: value for key, value in table.items() if key != "scales"}
    if scale is not None:
        if scale not in scales:
            raise ConfigInvalid(f"{path} has no scale {scale!r}; there are: {', '.join(scales) or 'none'}")
        _check_points(table, scales[scale], f"{path}: scales.{scale}.axes")
        table = laid_over(table, scales[scale])
    if "model" in table and "run" not in table:
        table = _study_of_run(table, path.stem)
    try:
        return StudyFile.model_validate(table)
    except ValidationError as error:
        faults = faults_of(error, table, whole="study file")
        raise ConfigInvalid("\n".join(_in_files(files, scale, *fault) for fault in faults), faults) from None


def _in_files(files: Sequence[tuple[Path, Table]], scale: str | None, field: str, text: str) -> str:
    """Returns a line about a fault, at the newest place that gives most of its field's path."""
    most, place = 0, (files[-1][0], field)
    for prefix in ("", *([f"{dotted('scales', scale)}."] if scale is not None else [])):
        for path, table in files:
            there = keys_there(table, prefix + field) - (2 if prefix else 0)
            if there > 0 and there >= most:
                most, place = there, (path, prefix + field)
    return in_file(place[0], text_files.read(place[0]), [(place[1], text)])


def _study_of_run(run: Table, name: str) -> Table:
    """Returns the study of one cell that a run file is; its seed is the study's."""
    study: Table = {"name": run.get("name", name), "data": {"data": {}}, "run": run}
    if isinstance(run.get("rounds"), dict) and "seed" in run["rounds"]:
        study["seeds"] = [run["rounds"].pop("seed")]
    return study


def changed(study: StudyFile, fresh: Mapping[str, Any], path: Path) -> StudyFile:
    """Returns a study with other values of some of its keys.

    Args:
        study: The study.
        fresh: The values by key.
        path: Its file, for messages.

    Raises:
        ConfigInvalid: With every fault.
    """
    table = {**study.model_dump(), **fresh}
    try:
        return StudyFile.model_validate(table)
    except ValidationError as error:
        faults = faults_of(error, table, whole="study file")
        raise ConfigInvalid(in_file(path, text_files.read(path), faults, fresh), faults) from None


def laid_over(table: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """Returns a study's table with another laid over it; the tables of runs in it as `overrides.merged` does."""
    result = dict(table)
    for key, value in over.items():
        below = result.get(key)
        if not (isinstance(value, Mapping) and isinstance(below, Mapping)):
            result[key] = value
        elif key == "run":
            result[key] = merged(below, value)
        elif key == "axes":
            result[key] = {**below, **{axis: _points(below.get(axis, {}), of) for axis, of in value.items()}}
        else:
            result[key] = laid_over(below, value)
    return result


def _points(points: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """Returns the points of an axis with others laid over them; one that is false is taken away."""
    result = dict(points)
    for name, fields in over.items():
        if fields is False:
            result.pop(name, None)
        else:
            result[name] = united(result.get(name, {}), fields) if isinstance(fields, Mapping) else fields
    return result


def _with_bases(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[Path, Table]]:
    """Returns the tables of a study file's bases, the lowest first, and its own; paths of data as seen from here."""
    table = _read(path)
    if path.resolve() in seen:
        raise ConfigInvalid(f"{path}: base: leads back to this file")
    for part in (table, *table.get("scales", {}).values()):
        for each in part.get("data", {}).values():
            _place_beside(path, each)
    base = table.pop("base", None)
    if base is None:
        return [(path, table)]
    if not isinstance(base, str):
        raise ConfigInvalid(f"{path}: base: should be the path of a study file")
    return [*_with_bases(path.parent / base, (*seen, path.resolve())), (path, table)]


def _place_beside(path: Path, data_set: Any) -> None:
    """Makes the paths of a data set, which are beside a study file, those from here."""
    for split in ("train", "test") if isinstance(data_set, dict) else ():
        place = data_set.get(split)
        if isinstance(place, str) and place and not is_hub(place):
            data_set[split] = str(path.parent / place)


def _check_points(table: Table, scale: Table, at: str) -> None:
    """Checks that a scale's axes, and the points that it takes away, are there; it may add points to an axis.

    Raises:
        ConfigInvalid: With the first one that is not.
    """
    axes = table.get("axes", {})
    for axis, points in scale.get("axes", {}).items():
        if axis not in axes:
            raise ConfigInvalid(f"{at}.{axis}: there is no axis {axis!r}; there are: {', '.join(axes) or 'none'}")
        for point, fields in points.items():
            if fields is False and point not in axes[axis]:
                words = ", ".join(axes[axis])
                raise ConfigInvalid(f"{at}.{axis} takes point {point!r} away, which is not there; there are: {words}")


def _check_tables(table: Mapping[str, Any], path: Path, at: str = "") -> None:
    """Checks that what files are laid over by, and scales, are tables.

    Raises:
        ConfigInvalid: With the key that has none.
    """
    parts = {key: table[key] for key in ("run", "data", "axes", "scales") if key in table}
    inner = {f"{key}.{name}": each for key in ("axes", "scales") for name, each in _items(table.get(key))}
    for key, value in {**parts, **inner}.items():
        if not isinstance(value, Mapping):
            raise ConfigInvalid(f"{path}: {at}{key}: should be a table")
    for name, scale in _items(table.get("scales")):
        _check_tables(scale, path, f"{at}scales.{name}.")


def _items(table: Any) -> Iterable[tuple[str, Any]]:
    return table.items() if isinstance(table, Mapping) else ()


def _read(path: Path) -> Table:
    try:
        table = text_files.toml(text_files.read(path))
    except OSError as error:
        raise ConfigInvalid(f"cannot read study file {path}: {error.strerror}") from None
    except (text_files.NotText, tomllib.TOMLDecodeError, ValueError) as error:
        raise ConfigInvalid(f"{path} is not a TOML file: {error}") from None
    _check_tables(table, path)
    return table
