"""Paths that a program gives as arguments."""

from __future__ import annotations

import os
from pathlib import Path

from fedpeft.errors import SettingsInvalid


def path_of(value: object, argument: str) -> Path:
    """Returns an argument as a path.

    Raises:
        SettingsInvalid: If it is none.
    """
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise SettingsInvalid(f"{argument} is a path, a str or os.PathLike; a {type(value).__name__} was given")
