"""`fedpeft study`: the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft import formatting
from fedpeft.extensions import extend
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.imports import Imports
from fedpeft_operator.cli.path_checks import check_results_folder
from fedpeft_operator.cli.study import options
from fedpeft_operator.cli.weights import Weights

app = typer.Typer(no_args_is_help=True, help="Plan, run and report a study: a run file varied along axes and seeds.")

Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the results; cells there are not repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_DATA = "--data cifar10=data/cifar10"


@app.command(
    epilog=epilog(
        f"fedpeft study run communication.toml {_DATA} --out results",
        "fedpeft study run run.toml --data data/cifar10 --grid training.learning_rate=0.01,0.03 --out sweep",
        hint="A study that was interrupted goes on where it was when the command is repeated.",
        ends=(Exit.NOT_COMPLETED, Exit.INTERRUPTED),
    )
)
def run(
    file: options.File,
    out: Out,
    data: options.Data = [],  # noqa: B006  # typer copies it
    weights: Weights = None,
    scale: options.Scale = None,
    settings: options.Settings = [],  # noqa: B006
    seeds: options.Seeds = [],  # noqa: B006
    grids: options.Grids = [],  # noqa: B006
    only: options.Only = [],  # noqa: B006
    device: options.Device = "auto",
    threads: options.Threads = 1,
    jobs: options.Jobs = None,
    imports: Imports = [],  # noqa: B006
    track: options.Track = [],  # noqa: B006
    over_network: Annotated[
        bool,
        typer.Option("--over-network", help="Hold each run with a server and agents on this machine, a process each."),
    ] = False,
) -> None:
    """Simulate every cell of a study that has no results yet, several at once, and write the report.

    All cells are checked before the first one runs. Ends with 5 if a cell failed; the others have their results.
    """
    check_results_folder(out)
    options.require_study()
    extend(imports)
    from fedpeft.studies.cell_trackers import CellTrackers
    from fedpeft.studies.execution import cells_at_once, execute
    from fedpeft.studies.report import write_report
    from fedpeft.studies.results import load_results
    from fedpeft_operator.cli.study.progress import Progress

    machine = options.machine_of(device, threads, weights, over_network=over_network)
    output.note("checking all cells ...")
    study, cells = options.cells_for(file, data, scale, settings, seeds, grids, only, machine)
    at_once = (jobs or 1) if over_network else cells_at_once(jobs, threads)
    progress, trackers = Progress(len(cells), at_once), CellTrackers(study.name, tuple(track), out)
    try:
        ended = execute(study, cells, out, machine, at_once, progress, options.work_of(machine, trackers))
        missed = trackers.write((done.cell, done.folder) for done in ended if not done.failure)
    except KeyboardInterrupt:
        output.note(f"fedpeft: interrupted: {out} keeps {progress.words}; the same command goes on with the others")
        raise typer.Exit(Exit.INTERRUPTED) from None
    for tracker, rounds in missed.items():
        what, them = (formatting.counted(rounds, "round"), "them") if rounds else ("the end of a cell", "it")
        output.note(f"fedpeft: {tracker} misses {what}; the same command writes {them}")
    results = load_results(out)
    files = write_report(results, out / "report")
    if results.overlap:
        output.note(f"fedpeft: {results.overlap}")
    failed = [done for done in ended if done.failure]
    output.say(f"{study.name}: {formatting.counted(len(cells) - len(failed), 'cell')} of {len(cells)} with results")
    output.say(f"report: {files[0]}")
    for done in failed:
        output.note(f"fedpeft: {done.cell.label}: {done.failure}")
    if failed:
        raise typer.Exit(Exit.NOT_COMPLETED)


@app.command(epilog=epilog(f"fedpeft study plan communication.toml {_DATA} --out results"))
def plan(
    file: options.File,
    data: options.Data = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of results; cells there take no time.")
    ] = None,
    weights: Weights = None,
    scale: options.Scale = None,
    settings: options.Settings = [],  # noqa: B006
    seeds: options.Seeds = [],  # noqa: B006
    grids: options.Grids = [],  # noqa: B006
    only: options.Only = [],  # noqa: B006
    device: options.Device = "auto",
    threads: options.Threads = 1,
    jobs: options.Jobs = None,
    imports: Imports = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Say what a study will take: cells, bytes and hours, by one short round of each kind of cell."""
    options.require_study()
    extend(imports)
    from fedpeft.studies.execution import cells_at_once
    from fedpeft.studies.plan import plan_of
    from fedpeft_operator.cli.study.plan_table import say_plan

    machine = options.machine_of(device, threads, weights)
    study, cells = options.cells_for(file, data, scale, settings, seeds, grids, only, machine)
    planned = plan_of(cells, out, machine, lambda cell: output.note(f"timing {cell.label} ..."))
    say_plan(study.name, planned, cells_at_once(jobs, threads), as_json=as_json)


@app.command(epilog=epilog("fedpeft study report results"))
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study's results.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the report; DIR/report if absent.")
    ] = None,
) -> None:
    """Write the report of what results there are: an HTML page, figures (PNG, SVG), CSV and LaTeX."""
    options.require_study()
    from fedpeft.studies.report import write_report
    from fedpeft.studies.results import load_results

    for path in write_report(load_results(folder), out or folder / "report"):
        output.say(str(path))
