"""Figures of finished runs: the curve of a report, and means with confidence intervals over seeds.

A report is that of a simulation (report.json), or what `fedpeft run show --json` says of a run that a server held: both
have the same keys. Bytes are payload bytes, up and down of all clients together; seconds are those of the rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from pydantic import BaseModel, ValidationError

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigInvalid, DataInvalid, SettingsInvalid
from fedpeft.formatting import counted
from fedpeft.rounds import record
from fedpeft.rpc import wire
from fedpeft.studies.files import CELLS, FAILURE, RECORDS, REPORT, STUDY
from fedpeft.v1 import run_pb2

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Point:
    """A version of a run.

    Attributes:
        version: 0, 1, 2...
        bytes: Payload bytes until it was committed.
        seconds: Seconds of the rounds until then.
        accuracy: On held-out data, 0 to 1; None if it was not scored.
        loss: Likewise.
    """

    version: int
    bytes: int
    seconds: float
    accuracy: float | None
    loss: float | None

    def as_dict(self) -> dict[str, Any]:
        """Returns it as a row of a table."""
        return {
            "version": self.version,
            "payload_bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "accuracy": self.accuracy,
            "loss": self.loss,
        }


Curve = tuple[Point, ...]


@dataclass(frozen=True)
class Estimate:
    """The mean of a figure over seeds.

    Attributes:
        mean: Arithmetic mean.
        half_width: Of the 95 % confidence interval by Student's t; None for a single value.
        count: Number of values.
    """

    mean: float
    half_width: float | None
    count: int


def curve_of(report: Mapping[str, Any]) -> Curve:
    """Returns the versions of a report, version 0 first."""
    metrics = report.get("initial_metrics") or {}
    points = [Point(0, 0, 0.0, metrics.get("accuracy"), metrics.get("loss"))]
    for row in report["rounds"]:
        moved = int(row["payload_bytes_up"]) + int(row["payload_bytes_down"])
        last, metrics = points[-1], row["metrics"]
        points.append(
            Point(
                int(row["version"]),
                last.bytes + moved,
                last.seconds + float(row["seconds"] or 0.0),
                metrics.get("accuracy"),
                metrics.get("loss"),
            )
        )
    return tuple(points)


def accuracy_within(curve: Curve, budget_bytes: int) -> float | None:
    """Returns the accuracy of the last scored version that a budget of bytes pays for; None if there is none."""
    scored = [point.accuracy for point in curve if point.bytes <= budget_bytes and point.accuracy is not None]
    return scored[-1] if scored else None


def until(curve: Curve, accuracy: float) -> Point | None:
    """Returns the first version that is at least so accurate; None if none is."""
    return next((p for p in curve if p.accuracy is not None and p.accuracy >= accuracy), None)


def estimate(values: Iterable[float]) -> Estimate | None:
    """Returns mean and confidence interval of figures of different seeds; None without any."""
    values = list(values)
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, 1)
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    quantile = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean, quantile * deviation / math.sqrt(len(values)), len(values))


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Returns the estimate of ours minus theirs, paired by seed: what both share of a seed cancels out."""
    return estimate(ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys()))


@dataclass(frozen=True)
class CellResult:
    """Results of a cell.

    Attributes:
        key: Name of its folder.
        points: Its point of each axis.
        seed: Its seed.
        label: A line for people.
        report: Its report, with the tickets of its last round alone; None if there is none.
        failure: Reason why there is none; empty if nobody tried, or there is one.
    """

    key: str
    points: Mapping[str, str]
    seed: int
    label: str
    report: Mapping[str, Any] | None
    failure: str

    @cached_property
    def curve(self) -> Curve:
        """The versions; empty without a report."""
        return () if self.report is None else curve_of(self.report)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The versions as rows of a table: version, payload_bytes, seconds, accuracy, loss."""
        return [p.as_dict() for p in self.curve]


@dataclass(frozen=True)
class Group:
    """The cells of a study that differ by their seed alone.

    Attributes:
        points: Their point of each axis.
        cells: By the order of seeds; those with a report.
        missing: Number of those without one.
    """

    points: Mapping[str, str]
    cells: tuple[CellResult, ...]
    missing: int

    @property
    def label(self) -> str:
        """A line for people."""
        return ", ".join(self.points.values()) or "all"

    def by_seed(self, figure: str) -> dict[int, float]:
        """Returns the newest version's figure, accuracy or loss, by seed; without those that have none.

        Raises:
            SettingsInvalid: If it is another figure.
        """
        if figure not in ("accuracy", "loss"):
            raise SettingsInvalid(f"there is no figure {figure!r}; there are: accuracy, loss")
        found = {cell.seed: getattr(cell.curve[-1], figure) for cell in self.cells}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean_curve(self) -> list[tuple[int, float, Estimate]]:
        """Returns number, mean bytes and accuracy of each version that all seeds scored."""
        curves = [cell.curve for cell in self.cells]
        result = []
        for points in zip(*curves, strict=False):
            accuracies = [point.accuracy for point in points if point.accuracy is not None]
            if len(accuracies) == len(points) and (found := estimate(accuracies)) is not None:
                result.append((points[0].version, sum(point.bytes for point in points) / len(points), found))
        return result


@dataclass(frozen=True)
class StudyResult:
    """The results of a study that was executed.

    Attributes:
        folder: Their folder.
        about: Content of study.json: name, title, question, target, budgets_bytes, axes.
        cells: All cells, in order.
    """

    folder: Path
    about: Mapping[str, Any]
    cells: tuple[CellResult, ...]

    @property
    def groups(self) -> list[Group]:
        """The cells by combination of points, in order."""
        found: dict[tuple[str, ...], list[CellResult]] = {}
        for cell in self.cells:
            found.setdefault(tuple(cell.points.values()), []).append(cell)
        return [
            Group(cells[0].points, with_report := tuple(c for c in cells if c.report), len(cells) - len(with_report))
            for cells in found.values()
        ]

    @property
    def overlap(self) -> str:
        """A sentence about held-out images that cells trained on; empty if there are none."""
        reports = [cell.report for cell in self.cells if cell.report]
        found = [each for report in reports if (each := report.get("overlap")) and each["images"]]
        if not found:
            return ""
        most = max(found, key=lambda each: int(each["images"]))
        return (
            f"in {counted(len(found), 'cell')} of {len(self.cells):,} held-out images are among the training images, "
            f"with the same bytes, {most['images']:,} of {most['held_out']:,} at most; accuracy on these does not say "
            "how new images fare"
        )


COMPLETED = "completed"
"""State of a run that has all its rounds; a report without a state is of one."""


class _Metrics(BaseModel):
    accuracy: float | None = None
    loss: float | None = None


class _Ticket(BaseModel):
    state: str
    update_norm: float = 0.0
    metrics: _Metrics = _Metrics()


class _Row(BaseModel):
    version: int
    payload_bytes_up: int
    payload_bytes_down: int
    seconds: float | None
    metrics: _Metrics
    tickets: list[_Ticket] = []


class _Rounds(BaseModel):
    seed: int = 0


class _Config(BaseModel):
    rounds: _Rounds = _Rounds()


class _Partition(BaseModel):
    variant: str
    alpha: float | None
    rows: int = 0
    classes: list[str] = []
    histogram: dict[str, list[int]] = {}
    skew: dict[str, float | None]


class _Distances(BaseModel):
    backbone: float
    head: float
    added: float


class _Overlap(BaseModel):
    images: int
    held_out: int


class _Report(BaseModel):
    """Parts of a report that tables and figures are made of; a run of a server may lack figures of version 0."""

    state: str = COMPLETED
    adapter_parameters: int | None = None
    initial_metrics: _Metrics | None = None
    rounds: list[_Row]
    config: _Config = _Config()
    facts: dict[str, str] = {}
    partition: _Partition | None = None
    squared_distances: _Distances | None = None
    overlap: _Overlap | None = None


class _Cell(BaseModel):
    key: str
    points: dict[str, str]
    seed: int
    label: str


class _About(BaseModel):
    name: str
    title: str
    question: str
    target: float | None
    budgets_bytes: list[float]
    axes: dict[str, Any]
    cells: list[_Cell]


class _Failure(BaseModel):
    message: str


def checked_report(report: Any, file: Path) -> dict[str, Any]:
    """Returns a report that was read from a file, if it has what tables and figures are made of.

    Raises:
        DataInvalid: If it has not, with the place in it.
    """
    return _checked(_Report, report, file)


def _checked(form: type[BaseModel], content: Any, file: Path) -> dict[str, Any]:
    try:
        form.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataInvalid(f"{file} cannot be used: {place or 'its content'}: {first['msg']}") from None
    found: dict[str, Any] = content
    return found


def load_results(folder: Path) -> StudyResult:
    """Reads what an execution left.

    Raises:
        DataInvalid: If the folder has no study, or a file of the study in it is broken; a cell whose report is has no
            results, and that for its reason.
    """
    about = _checked(_About, _json(folder / STUDY, f"{folder} holds no study"), folder / STUDY)
    cells = []
    for row in about["cells"]:
        place = folder / CELLS / row["key"]
        try:
            report = load_report(place) if (place / REPORT).exists() else None
            failure = paused(report) if report else _failed(place)
        except DataInvalid as error:
            report, failure = None, f"{error.message}; `fedpeft study run` computes this cell again"
        for earlier in (report or {"rounds": []})["rounds"][:-1]:
            earlier.pop("tickets", None)  # tables show those of the last round, and all of them fill the memory
        kept = None if failure else report
        cells.append(CellResult(row["key"], row["points"], row["seed"], row["label"], kept, failure))
    return StudyResult(folder, about, tuple(cells))


def ended(folder: Path) -> str:
    """Returns the reason why a cell that ended has no results; empty if it has, or never ran.

    A run that was paused, because a round could not get its updates, has no results that could be compared.
    """
    return paused(load_report(folder)) if (folder / REPORT).exists() else _failed(folder)


def config_of(report: Mapping[str, Any]) -> RunConfig:
    """Returns the run file of a report, without `[simulation]`.

    Raises:
        KeyError: If it has none.
        ParseError: Of protobuf's JSON, if it is malformed.
        ConfigInvalid: If a field breaks a rule.
    """
    return wire.config_from_proto(json_format.ParseDict(report["config"], run_pb2.RunConfig()))


def own_report(folder: Path, config: RunConfig) -> dict[str, Any]:
    """Returns the report in a folder, if it is of a run, and of the records that lie beside it.

    Raises:
        DataInvalid: If it is of another, or cannot be read.
    """
    report = load_report(folder)
    try:
        found = config_of(report)
    except (KeyError, json_format.ParseError, ConfigInvalid) as error:
        raise DataInvalid(f"{folder / REPORT} cannot be used: config: {error}") from None
    if _compared(found) != _compared(wire.config_from_proto(wire.config_to_proto(config))):
        raise DataInvalid(f"{folder / REPORT} is of another run")
    if report["rounds"] and (folder / RECORDS).exists():
        lines = (folder / RECORDS).read_text("ascii", "replace").splitlines()
        last = record.digest(lines[-1]) if lines else ""
        if last != report["rounds"][-1].get("record_sha256"):
            raise DataInvalid(f"{folder / RECORDS} does not end with the record of the last round in {folder / REPORT}")
    return report


def _compared(config: RunConfig) -> dict[str, Any]:
    """Returns a run without its name, and without the noise, which may have been worked out."""
    return config.model_dump(exclude={"name": True, "simulation": True, "privacy": {"noise_multiplier"}})


def paused(report: Mapping[str, Any]) -> str:
    """Returns the reason why a report has no results that could be compared; empty if it has."""
    if report.get("state", COMPLETED) == COMPLETED:
        return ""
    return f"the run is {report['state']} after round {report.get('version', 0)}: {report.get('reason', '')}"


def _failed(folder: Path) -> str:
    file = folder / FAILURE
    return str(_checked(_Failure, _json(file, f"{file} is not there"), file)["message"]) if file.exists() else ""


def load_report(folder: Path) -> dict[str, Any]:
    """Returns the report of a simulation's folder; raises as `load_results`."""
    return checked_report(_json(folder / REPORT, f"{folder} holds no results of a simulation"), folder / REPORT)


def _json(path: Path, absent: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataInvalid(absent) from None
    except (OSError, ValueError) as error:
        raise DataInvalid(f"cannot read {path}: {error}") from None


def scored(groups: Sequence[Group]) -> bool:
    """Returns True if any version of the groups was scored."""
    return any(point.accuracy is not None for group in groups for cell in group.cells for point in cell.curve)
