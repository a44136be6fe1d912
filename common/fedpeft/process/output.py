"""Output: tables and progress on a terminal, aligned plain text otherwise, and with `--json` JSON alone.

Standard output carries results; what is said about them goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpeft.process.start import note as note

GAP = "  "
"""Between two columns."""
LINE_CHARACTERS = 100
"""Longest line of a text below a row, where no terminal says how wide it is."""


def is_terminal() -> bool:
    """Returns True if standard output is a terminal."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str) -> None:
    """Writes a line of result."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_json(value: Any, *, line: bool = False) -> None:
    """Writes JSON: indented, or as one line."""
    say(json.dumps(value, ensure_ascii=False, indent=None if line else 2))


def say_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = (), below: Sequence[str] = ()
) -> None:
    """Writes a table.

    Args:
        columns: The headings.
        rows: The cells, as many a row as there are headings.
        right: Headings of the columns that are aligned to the right, such as numbers.
        below: A text for each row, folded into lines below it; none if empty.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    texts = list(below) or [""] * len(cells)
    if is_terminal() and sum(widths) + len(GAP) * (len(widths) - 1) > Console().width:
        _say_records([*columns, ""], [[*row, text] for row, text in zip(cells, texts, strict=True)])
        return
    if is_terminal() and not below:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(escape, row))
        Console().print(table)
        return
    for row, text in zip([list(columns), *cells], ["", *texts], strict=True):
        parts = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        say(GAP.join(parts).rstrip())
        most = min(Console().width, LINE_CHARACTERS) if is_terminal() else LINE_CHARACTERS
        for line in textwrap.wrap(text, most - 2 * len(GAP)):
            say(2 * GAP + line)


def _say_records(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Writes what a narrow terminal has no room for side by side: a line a cell, so that an id can still be copied."""
    width = max(map(len, columns))
    for number, row in enumerate(cells):
        if number:
            say("")
        for column, cell in zip(columns, row, strict=True):
            if column or cell:
                say(f"{column.ljust(width)}{GAP}{cell}".rstrip())


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on standard error while bytes move, if a person looks; yields what to call with (done, total)."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
