"""Flags that `fedpeft study run` and `fedpeft study plan` share, and the cells that they make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.arguments import empty
from fedpeft.errors import SettingsInvalid
from fedpeft_operator.cli.session import require
from fedpeft_operator.cli.trackers import NAMES

if TYPE_CHECKING:
    from fedpeft.studies.cell_trackers import CellTrackers
    from fedpeft.studies.cells import Cell, Machine
    from fedpeft.studies.execution import CellWork
    from fedpeft.studies.study_file import StudyFile

File = Annotated[Path, typer.Argument(metavar="FILE", help="The study file (TOML), or a run file.")]
Data = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="[NAME=]PATH",
        help="A data set of the study: a folder with train.parquet and test.parquet, or folders of these names; or on "
        "the Hugging Face hub, such as hub:cifar10.",
    ),
]
Scale = Annotated[str | None, typer.Option("--scale", metavar="NAME", help="One of the scales of the file.")]
Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A field of every cell's run file, such as rounds.count=3."),
]
Seeds = Annotated[
    list[int], typer.Option("--seed", metavar="N", min=0, help="A seed in place of the file's; once for each.")
]
Grids = Annotated[
    list[str],
    typer.Option("--grid", metavar="KEY=V,V", help="One more axis: a field, and the values that it takes in turn."),
]
Only = Annotated[
    list[str], typer.Option("--only", metavar="AXIS=POINT,POINT", help="Points of an axis; the others are left out.")
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option("--threads", metavar="N", min=1, max=4096, help="Threads of torch in each cell.")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", metavar="N", min=1, max=1024, help="Cells at once; cores / threads if absent."),
]
Track = Annotated[
    list[str],
    typer.Option(
        "--track",
        metavar="NAME[=TARGET]",
        help=f"{NAMES} Each cell is a run there. The default is a folder or file in --out. May be repeated.",
    ),
]


def require_study() -> None:
    """Checks that what a study needs is installed."""
    require("study", "torch", "timm", "pyarrow", "matplotlib", "jinja2", "scipy")


def cells_for(
    file: Path,
    data: Sequence[str],
    scale: str | None,
    settings: Sequence[str],
    seeds: Sequence[int],
    grids: Sequence[str],
    only: Sequence[str],
    machine: Machine,
) -> tuple[StudyFile, list[Cell]]:
    """Reads a study, and returns it with all its cells, checked; raises as `fedpeft.studies.assembly.assembled`.

    Raises:
        SettingsInvalid: If a flag has another form.
    """
    from fedpeft.config.overrides import parse_overrides
    from fedpeft.studies.assembly import Changes, assembled
    from fedpeft.studies.cells import grid_axes

    wanted: dict[str, list[str]] = {}
    for axis, points in map(_pair, only):
        wanted.setdefault(axis, []).extend(points.split(","))
    changes = Changes(scale, parse_overrides(settings), seeds, grid_axes(grids), wanted)
    return assembled(file, _places(data), changes, machine)


def machine_of(device: str, threads: int, weights: Path | None, *, over_network: bool = False) -> Machine:
    """Returns the machine that the flags describe.

    Raises:
        SettingsInvalid: If there are no weights where the flag says.
    """
    from fedpeft.studies.cells import Machine

    if weights is not None and not weights.exists():
        raise SettingsInvalid(f"--weights {weights}: there is no such file or folder")
    return Machine(device, threads, weights, over_network)


def work_of(machine: Machine, trackers: CellTrackers) -> CellWork:
    """Returns what the process of a cell does."""
    from fedpeft.studies.cell_process import run_cell

    if not machine.over_network:
        return partial(run_cell, trackers=trackers)
    require("demo", "sqlalchemy", "obstore", "prometheus_client")
    from fedpeft_operator.cli.study.network import run_cell_over_network

    return run_cell_over_network


def _places(data: Sequence[str]) -> dict[str, Path]:
    """Returns the places that the flags name; "" names the only data set."""
    places: dict[str, Path] = {}
    for given in data:
        name, equals, path = given.partition("=")
        name, path = (name, path) if equals else ("", name)
        if not path:
            raise SettingsInvalid(empty(f"--data {given}"))
        if name in places:
            raise SettingsInvalid(f"--data {given}: {places[name]} is given for this data set too; give one of them")
        places[name] = Path(path)
    return places


def _pair(text: str) -> tuple[str, str]:
    axis, equals, points = text.partition("=")
    if not equals:
        raise SettingsInvalid(f"--only {text}: give AXIS=POINT, or several points with commas between")
    return axis, points
