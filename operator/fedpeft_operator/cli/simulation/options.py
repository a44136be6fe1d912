"""Flags of `fedpeft simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpeft_operator.cli.trackers import NAMES

File = Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).")]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="PATH",
        help="A folder of clients that fedpeft partition wrote, or one data set that the run file divides.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder for adapter.safetensors, report.json, records.jsonl.")
]
Evaluate = Annotated[
    Path | None, typer.Option("--eval", metavar="PATH", help="Held-out data on which every version is scored.")
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="inprocess, processes, batched or ray (at RAY_ADDRESS, else on this machine), in place of the file's.",
    ),
]
LabelMap = Annotated[
    Path | None,
    typer.Option("--label-map", metavar="FILE", help="TOML or JSON of own class name = run class, for all data."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", metavar="N", min=1, max=4096, help="Threads of torch; torch's own choice if absent."),
]
Track = Annotated[
    list[str],
    typer.Option(
        "--track",
        metavar="NAME[=TARGET]",
        help=f"{NAMES} The default is a folder or file in --out. May be repeated.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print report.json.")]
