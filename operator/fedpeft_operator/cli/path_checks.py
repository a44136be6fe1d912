"""Checks of a command's output path, made before anything is loaded or done that would have to be undone."""

from __future__ import annotations

import os
from pathlib import Path

from fedpeft.errors import SettingsInvalid


def check_folder(out: Path) -> None:
    """Checks that the folder of `--out` is there and may be written.

    Raises:
        SettingsInvalid: If it is not.
    """
    folder = out.absolute().parent
    if not folder.is_dir():
        raise SettingsInvalid(f"--out {out}: there is no folder {folder}; make it first")
    _check_writable(out, folder)


def check_results_folder(out: Path) -> None:
    """Checks that `--out` is a folder that may be written, or can be made with those above it.

    Raises:
        SettingsInvalid: If it cannot.
    """
    there = next(place for place in (out.absolute(), *out.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise SettingsInvalid(f"--out {out}: {there} is not a folder; name another place")
    _check_writable(out, there)


def _check_writable(out: Path, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsInvalid(f"--out {out}: you may not write in {folder}; name another place")


def check_file(out: Path, what: str) -> None:
    """Checks that `--out` can become a file.

    Args:
        out: The path.
        what: Name of the thing to be written there.

    Raises:
        SettingsInvalid: If it cannot.
    """
    check_folder(out)
    if out.is_dir():
        raise SettingsInvalid(f"--out {out} is a folder; {what} is written as a file")
