"""Flags of commands beside a long-running process, which read the same environment variables as that process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_path(parser: argparse.ArgumentParser, flag: str, variable: str, said: str, *, metavar: str = "DIR") -> None:
    """Adds a flag that names a path.

    Args:
        parser: The command's.
        flag: For example `--data-dir`.
        variable: Environment variable that holds for the flag where that is missing.
        said: Help; `{}` in it becomes the variable.
        metavar: `DIR` or `FILE`.
    """
    default = os.environ.get(variable) or None
    parser.add_argument(flag, metavar=metavar, type=path_or_none, default=default, help=said.format(variable))


def path_or_none(text: str) -> Path | None:
    """Returns a path that was named; an empty name is none, and not the current folder."""
    return Path(text) if text else None
