"""The table of committed rounds: its columns, and how commands print it."""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.api.round_table import RoundFigures
from fedpeft.process import output

COLUMNS = ("round", "clients", "accuracy", "train loss", "up", "down", "full fine-tuning", "seconds")
"""Columns of a run that is watched, and of a simulation's report."""
OF_SHOW = tuple(column for column in COLUMNS if column != "train loss")
"""Columns of `fedpeft run show`."""


def say_rounds(rounds: Iterable[RoundFigures], columns: tuple[str, ...] = COLUMNS) -> None:
    """Prints rounds as a table."""
    heads = tuple(column.upper() for column in columns)
    output.say_table(heads, [each.cells(columns) for each in rounds], right=heads)
