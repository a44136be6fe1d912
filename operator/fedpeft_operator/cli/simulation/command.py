"""`fedpeft simulate`: the command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from fedpeft.api import views
from fedpeft.extensions import extend
from fedpeft.process import output
from fedpeft_operator.cli.columns import ImageColumn, LabelColumn, MaxImagePixels
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.imports import Imports
from fedpeft_operator.cli.overrides import Seed, Settings, override_of
from fedpeft_operator.cli.path_checks import check_results_folder
from fedpeft_operator.cli.session import require
from fedpeft_operator.cli.simulation import options, start
from fedpeft_operator.cli.simulation.outcome import say_outcome
from fedpeft_operator.cli.simulation.progress import Progress
from fedpeft_operator.cli.weights import Weights, check_needed

EPILOG = epilog(
    "fedpeft simulate emoji.toml --data sites --eval test.parquet --out simulated",
    ends=(Exit.NOT_COMPLETED, Exit.INTERRUPTED),
)


def simulate(
    file: options.File,
    data: options.Data,
    out: options.Out,
    evaluate: options.Evaluate = None,
    weights: Weights = None,
    settings: Settings = [],  # noqa: B006  # typer copies it
    seed: Seed = None,
    engine: options.Engine = None,
    label_map: options.LabelMap = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    max_image_pixels: MaxImagePixels = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    imports: Imports = [],  # noqa: B006
    track: options.Track = [],  # noqa: B006
    as_json: options.AsJson = False,
) -> None:
    """Hold a run's federation on this machine, without a network, with the code of server and client.

    The adapter has the bits that a server and its agents give. Ends with 5 if a round could not get its updates.
    """
    check_results_folder(out)
    require("train", "torch", "timm", "pyarrow")
    extend(imports)
    from fedpeft.config import faults_in
    from fedpeft.config.overrides import joined

    note = output.note if not as_json else lambda _: None
    placed = {} if engine is None else {"simulation": {"engine": engine}}
    override = joined(override_of(settings, seed), placed)
    config = start.config_of(file, override, data, label_map, image_column, label_column)
    check_needed(config.model, weights)
    note(f"{config.name}: {start.plan(config)}; loading PyTorch and {data} ...")
    from fedpeft import simulation
    from fedpeft.tracking import tracking_to

    simulation.check_apart(out, (data, evaluate))
    simulation.check_folder(out)
    with faults_in(file, override):
        simulation.check_run(config, device)
    _set_up(threads)
    tracking = tracking_to(track, out)
    reading = simulation.reading_of(config, image_column, label_column, max_image_pixels)
    clients, partition = simulation.clients_of(data, config, reading)
    note(f"{start.division(clients, partition)}; building the model, {start.weights(config, weights)}, on {device} ...")
    progress = Progress(config.rounds.count, resumable=simulation.is_resumable(config), quiet=as_json)
    with faults_in(file, override), _interruptible(out, progress):
        report = simulation.simulate(
            config,
            clients,
            out,
            evaluate,
            weights,
            label_map=label_map,
            device=device,
            reading=reading,
            partition=partition,
            resumed=progress.resumed,
            committed=progress.committed,
            worked=progress.worked,
            tracking=tracking,
        )
    _end(report, out, as_json=as_json)


@contextmanager
def _interruptible(out: Path, progress: Progress) -> Iterator[None]:
    """Says on Ctrl-C what is left of the simulation."""
    try:
        yield
    except KeyboardInterrupt:
        output.note(
            f"fedpeft: interrupted after {progress.rounds}, whose results are in {out}; running the command again "
            f"{'goes on from there' if progress.resumable else 'starts at round 1'}"
        )
        raise typer.Exit(Exit.INTERRUPTED) from None


def _end(report: views.Json, out: Path, *, as_json: bool) -> None:
    """Prints the report; ends with an exit code of its own if the run is paused."""
    if as_json:
        output.say_json(report)
    else:
        say_outcome(report, out)
    if report["state"] != "completed":
        output.note(f"fedpeft: the run is paused: {report['reason']}")
        raise typer.Exit(Exit.NOT_COMPLETED)


def _set_up(threads: int | None) -> None:
    """Sets how many threads torch has."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
