"""`fedpeft simulate`: a run file's federation on one machine, without a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.round_table import of_json
from fedpeft.extensions import extend
from fedpeft.process import output
from fedpeft_operator.cli.columns import ImageColumn, LabelColumn, MaxImagePixels
from fedpeft_operator.cli.epilogs import epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.imports import Imports
from fedpeft_operator.cli.local import simulation_start as start
from fedpeft_operator.cli.round_rows import say_rounds
from fedpeft_operator.cli.session import require
from fedpeft_operator.cli.trackers import NAMES
from fedpeft_operator.cli.weights import Weights, check_needed

EVERY_S = 10.0
"""A round that takes longer says so often how far it is."""

EPILOG = epilog(
    "fedpeft simulate emoji.toml --data sites --eval test.parquet --out simulated",
    ends=(Exit.NOT_COMPLETED, Exit.INTERRUPTED),
)


def simulate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="PATH",
            help="A folder of clients that fedpeft partition wrote, or one data set that the run file divides.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for adapter.safetensors, report.json, records.jsonl.")
    ],
    evaluate: Annotated[
        Path | None, typer.Option("--eval", metavar="PATH", help="Held-out data on which every version is scored.")
    ] = None,
    weights: Weights = None,
    settings: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="A field in place of the run file's, such as rounds.count=3."),
    ] = [],  # noqa: B006  # typer copies it
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", min=0, help="The run's seed in place of the file's.")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine",
            metavar="NAME",
            help="inprocess, processes, batched or ray (at RAY_ADDRESS, else on this machine), in place of the file's.",
        ),
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option("--label-map", metavar="FILE", help="TOML or JSON of own class name = run class, for all data."),
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    max_image_pixels: MaxImagePixels = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, max=4096, help="Threads of torch; torch's own choice if absent."),
    ] = None,
    imports: Imports = [],  # noqa: B006
    track: Annotated[
        list[str],
        typer.Option(
            "--track",
            metavar="NAME[=TARGET]",
            help=f"{NAMES} The default is a folder or file in --out. May be repeated.",
        ),
    ] = [],  # noqa: B006  # typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json.")] = False,
) -> None:
    """Hold a run's federation on this machine, without a network, with the code of server and client.

    The adapter has the bits that a server and its agents give. Ends with 5 if a round could not get its updates.
    """
    from fedpeft.config import faults_in, load_run_file
    from fedpeft.config.overrides import merged, parse_overrides

    extend(imports)
    require("train", "torch", "timm", "pyarrow")
    note = output.note if not as_json else lambda _: None
    seeded = {} if seed is None else {"rounds": {"seed": seed}}
    placed = {} if engine is None else {"simulation": {"engine": engine}}
    override = merged(merged(parse_overrides(settings), seeded), placed)
    if label_map is None:  # it names classes of the run, which the data do not have
        override = merged(start.own_classes(file, override, data, image_column, label_column), override)
    config = load_run_file(file, override)
    check_needed(config.model, weights)
    note(f"{config.name}: {start.plan(config)}; loading PyTorch and {data} ...")
    from fedpeft import simulation
    from fedpeft.tracking import tracking_to

    _set_up(threads)
    tracking = tracking_to(track, out)
    reading = simulation.reading_of(config, image_column, label_column, max_image_pixels)
    clients, partition = simulation.clients_of(data, config, reading)
    note(f"{start.division(clients, partition)}; building the model, {start.weights(config, weights)}, on {device} ...")
    progress = _Progress(config.rounds.count, resumable=simulation.is_resumable(config), quiet=as_json)
    with faults_in(file), _interruptible(out, progress):
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
            committed=progress.committed,
            worked=progress.worked,
            tracking=tracking,
        )
    _end(report, out, as_json=as_json)


@contextmanager
def _interruptible(out: Path, progress: _Progress) -> Iterator[None]:
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
        _say(report, out)
    if report["state"] != "completed":
        output.note(f"fedpeft: the run is paused: {report['reason']}")
        raise typer.Exit(Exit.NOT_COMPLETED)


def _set_up(threads: int | None) -> None:
    """Sets what holds for the whole process: where logs go, and how many threads torch has."""
    import structlog
    import torch

    # Standard output carries the result alone; looked up anew, because who captures standard error replaces it.
    structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    if threads is not None:
        torch.set_num_threads(threads)


class _Progress:
    """Says every round that is committed, and how far a long one is."""

    def __init__(self, count: int, *, resumable: bool, quiet: bool) -> None:
        self._count = count
        self.resumable = resumable
        self._quiet = quiet
        self._last = 0
        self._said = time.monotonic()

    @property
    def rounds(self) -> str:
        """Number of committed rounds, in words."""
        return f"{self._last} of {formatting.counted(self._count, 'round')}"

    def committed(self, row: views.Json) -> None:
        """Takes a committed round, as the report has it."""
        self._last = int(row["version"])
        self._note(_line(row, self._count))

    def worked(self, number: int, had: int, sampled: int) -> None:
        """Takes a client's turn in a round, in which so many of those who were sampled had theirs."""
        if time.monotonic() - self._said >= EVERY_S:
            self._note(
                f"round {number} of {self._count}: {had} of {formatting.counted(sampled, 'client')} had their turn"
            )

    def _note(self, line: str) -> None:
        self._said = time.monotonic()
        if not self._quiet:
            output.note(line)


def _line(row: views.Json, count: int) -> str:
    """Returns what is said of a round as soon as it is committed."""
    metrics = row["metrics"]
    said = [f"round {row['version']} of {count}", formatting.counted(len(row["clients"]), "update")]
    if "accuracy" in metrics:
        said.append(f"accuracy {formatting.percent(metrics['accuracy'])}")
    if "train_loss" in metrics:
        said.append(f"training loss {metrics['train_loss']:.3f}")
    return ", ".join([*said, f"{row['seconds']:.1f} s"])


def _say(report: views.Json, out: Path) -> None:
    tuned, model = report["adapter_parameters"], report["model_parameters"]
    output.say(
        f"{report['name']!r} is {report['state']}: {report['method']}, {tuned:,} parameters of {model:,} "
        f"({100 * tuned / model:.2f} %); bytes are those of the encoded tensors"
    )
    if report["partition"]:
        skew = report["partition"]["skew"]
        output.say(
            f"  {formatting.counted(skew['clients'], 'client')} ({report['partition']['variant']}): "
            f"{skew['smallest']:,} to {formatting.counted(skew['largest'], 'row')}, "
            f"label skew {skew['total_variation']:.3f}"
        )
    if "accuracy" in report["initial_metrics"]:
        output.say(f"  accuracy of version 0: {formatting.percent(report['initial_metrics']['accuracy'])}")
    if report["rounds"]:
        say_rounds(of_json(row, "payload") for row in report["rounds"])
    if report["overlap"]:
        _say_overlap(report["overlap"])
    output.say(f"results: {out / 'adapter.safetensors'}, {out / 'report.json'}, {out / 'records.jsonl'}")


def _say_overlap(found: views.Json) -> None:
    """Says that accuracies are too high, and which images were not compared."""
    from fedpeft.data.overlap import Overlap

    shared = Overlap.of_dict(found)
    if shared.images:
        output.say(
            f"{shared.images:,} of {formatting.counted(shared.held_out, 'held-out image')} "
            f"{'is a training image' if shared.images == 1 else 'are training images'} too: these accuracies are too "
            "high; report.json names some"
        )
    if shared.not_compared:
        output.say(f"training and held-out images: {shared.not_compared}")
