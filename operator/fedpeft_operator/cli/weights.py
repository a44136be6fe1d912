"""The flag `--weights` of the commands that build a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.errors import SettingsInvalid

if TYPE_CHECKING:
    from fedpeft.config import ModelConfig

Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="PATH",
        help="A weights file, or a folder of them, that stands here for the one the run names.",
    ),
]


def check_needed(model: ModelConfig, weights: Path | None) -> None:
    """Checks that a run has a use for the flag.

    Raises:
        SettingsInvalid: If its model starts from random values, and a file was given.
    """
    if weights is not None and model.weights == "none":
        raise SettingsInvalid(
            f'--weights {weights} would not be used: the run says weights = "none", random values; leave the flag out, '
            "or name a file or hub in the run file"
        )
