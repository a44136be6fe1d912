"""The flag `--import` of the commands that train."""

from __future__ import annotations

from typing import Annotated

import typer

Imports = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        help="A module, or its file, that registers methods or others of one's own; imported first.",
    ),
]
