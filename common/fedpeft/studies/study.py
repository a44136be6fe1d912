"""Studies in a program or a notebook: a run file varied along axes and seeds, and what came of all of it.

    found = fedpeft.study("methods.toml", data={"cifar10": "data/cifar10"}, out="results")
    found                 # a table in a notebook
    found.to_frame()      # every version of every cell, for pandas

The same as `fedpeft study run`; `fedpeft.studies` has the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.arguments import is_list, list_of, mapping_of, path_of, text_of
from fedpeft.config.overrides import at_key, united
from fedpeft.errors import ConfigInvalid, SettingsInvalid
from fedpeft.frames import frame_of, table_html

if TYPE_CHECKING:
    import pandas

    from fedpeft.studies.assembly import Changes
    from fedpeft.studies.results import Group, StudyResult


class Study:
    """Results of a study. Made by `study`, or of the folder that one left.

    Args:
        folder: The folder.

    Raises:
        DataInvalid: If it holds none.
    """

    def __init__(self, folder: str | Path) -> None:
        from fedpeft.studies.results import load_results

        self.folder = path_of(folder, "folder")
        self.results: StudyResult = load_results(self.folder)

    @property
    def groups(self) -> list[Group]:
        """The cells by combination of points: each with `points`, `by_seed("accuracy")`, `mean_curve()`."""
        return self.results.groups

    @property
    def failures(self) -> dict[str, str]:
        """Reasons by cell, of those that have no results."""
        return {cell.label: cell.failure or "not executed" for cell in self.results.cells if cell.report is None}

    def to_frame(self) -> pandas.DataFrame:
        """Returns every version of every cell: the axes, seed, version, payload_bytes, seconds, accuracy, loss.

        Raises:
            LocalError: If pandas is not installed.
        """
        return frame_of({**cell.points, "seed": cell.seed, **row} for cell in self.results.cells for row in cell.rows)

    def report(self, out: str | Path | None = None) -> Path:
        """Writes the report, and returns its page.

        Args:
            out: A folder; `report` in that of the study if absent.

        Raises:
            StateInvalid: If it cannot be written.
        """
        from fedpeft.studies.report import write_report

        return write_report(self.results, self.folder / "report" if out is None else path_of(out, "out"))[0]

    def __repr__(self) -> str:
        there = sum(cell.report is not None for cell in self.results.cells)
        return (
            f"<fedpeft study {self.results.about['name']!r}: {there} of {len(self.results.cells)} cells with results>"
        )

    def _repr_html_(self) -> str:
        from fedpeft.studies.report.tables import outcome

        table = outcome(self.results)
        return table_html(table.caption, table.columns, table.rows)


def study(
    file: str | Path,
    data: str | Path | Mapping[str, str | Path],
    out: str | Path,
    *,
    weights: str | Path | None = None,
    scale: str | None = None,
    override: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
    only: Mapping[str, Sequence[str]] | None = None,
    device: str = "auto",
    threads: int = 1,
    jobs: int | None = None,
    track: Sequence[str] = (),
) -> Study:
    """Simulates every cell of a study that has no results yet; cells that fail are in `Study.failures`.

    Args:
        file: A study file, or a run file.
        data: The folder of the study's data set, or folders by the names of its data sets.
        out: Folder of the results; what is there is not repeated.
        weights: A weights file, or a folder of them, that stands here for the one that runs name.
        scale: Name of one of the file's scales.
        override: Fields that every cell gets: tables of a run file, or values by keys such as "rounds.count".
        seeds: Seeds in place of the file's.
        grid: More axes: the values that a field takes in turn, by its key.
        only: Points of an axis that are wanted.
        device: auto, cpu, cuda or cuda:N.
        threads: Of torch, in each cell.
        jobs: Cells at once; as many as there are cores for the threads if absent.
        track: Experiment trackers, `NAME` or `NAME=TARGET` each, as `--track` of `fedpeft study run` has them.

    Raises:
        ConfigInvalid: If the file, or a cell, is wrong, or there is no such tracker; before anything runs.
        DataInvalid: If the data of a cell is not there, cannot be divided so, or does not fit the classes.
        LocalError: If the library of a tracker is not installed.
        ModelInvalid: If there is no such model, or no such file of weights.
        SettingsInvalid: If an argument has a wrong type, a number is not positive, or there is no such device.
        StateInvalid: If another study writes to `out`, or it cannot be written.
    """
    for name, number in (("threads", threads), ("jobs", 1 if jobs is None else jobs)):
        if not isinstance(number, int) or number < 1:
            raise SettingsInvalid(f"{name} is a whole number from 1 on; {number!r} was given")
    text_of(device, "device")
    changes = _changes(scale, override, seeds, grid, only)
    tracked = tuple(list_of(track, "track", str, "texts"))
    from fedpeft.studies.assembly import assembled
    from fedpeft.studies.cell_process import run_cell
    from fedpeft.studies.cell_trackers import CellTrackers
    from fedpeft.studies.cells import Machine
    from fedpeft.studies.execution import cells_at_once, execute

    if isinstance(data, Mapping):
        places = {name: path_of(path, f"data[{name!r}]") for name, path in data.items()}
    else:
        places = {"": path_of(data, "data")}
    machine = Machine(device, threads, None if weights is None else path_of(weights, "weights"))
    found, cells = assembled(path_of(file, "file"), places, changes, machine)
    folder = path_of(out, "out")
    trackers = CellTrackers(found.name, tracked, folder)
    ended = execute(
        found, cells, folder, machine, cells_at_once(jobs, threads), None, partial(run_cell, trackers=trackers)
    )
    trackers.write((done.cell, done.folder) for done in ended if not done.failure)
    return Study(out)


def _changes(scale: Any, override: Any, seeds: Any, grid: Any, only: Any) -> Changes:
    """Returns the changes of a study that arguments of `study` make; raises `SettingsInvalid` for wrong types."""
    from fedpeft.studies.assembly import Changes

    keys = "keys of a run file to"
    axes = {} if grid is None else mapping_of(grid, "grid", f"{keys} lists of values", is_list)
    fields = {} if override is None else mapping_of(override, "override", f"{keys} values")
    points = {} if only is None else mapping_of(only, "only", "axes to lists of their points", is_list)
    numbers = list_of(seeds, "seeds", int, "whole numbers")
    return Changes(None if scale is None else text_of(scale, "scale"), _tables(fields), numbers, _axes(axes), points)


def _tables(override: Mapping[str, Any]) -> dict[str, Any]:
    """Returns overrides as tables, whose keys may be paths."""
    result: dict[str, Any] = {}
    for key, value in override.items():
        result = united(result, {key: value} if isinstance(value, Mapping) else at_key(key, value))
    return result


def _axes(grid: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    from fedpeft.studies.cells import axis_of

    for key, values in grid.items():
        if isinstance(values, str):
            raise ConfigInvalid(f"grid: {key!r} has the text {values!r}; give a list of values")
    return {key: axis_of(key, list(values)) for key, values in grid.items()}
