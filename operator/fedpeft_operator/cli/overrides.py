"""Flags that stand in place of fields of a run file: `--set` and `--seed`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from fedpeft.api import views

Settings = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="A field in place of the run file's, such as rounds.count=3."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="The run's seed in place of the file's.")]


def override_of(settings: Sequence[str], seed: int | None) -> views.Json:
    """Returns the fields that the flags give in place of the run file's.

    Raises:
        ConfigInvalid: If a setting is not KEY=VALUE, or a field is set twice.
    """
    from fedpeft.config.overrides import joined, parse_overrides

    return joined(parse_overrides(settings), {} if seed is None else {"rounds": {"seed": seed}})
