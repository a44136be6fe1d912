"""The flags `--state-dir` and `--identity` of commands on a state directory, and the checks of what the first names."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedpeft.errors import SettingsInvalid, StateInvalid
from fedpeft_client.state.state_dir import VARIABLE


def add(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds the flag; `more` ends its help."""
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        type=_folder,
        default=os.environ.get(VARIABLE) or None,
        help=f"the client's state directory ({VARIABLE}){more}",
    )


def add_identity(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of an identity folder that is not in the state directory."""
    parser.add_argument(
        "--identity",
        metavar="DIR",
        type=Path,
        default=os.environ.get("FEDPEFT_CLIENT_IDENTITY") or None,
        help="its identity folder, if that is not in the state directory (FEDPEFT_CLIENT_IDENTITY)",
    )


def _folder(text: str) -> Path | None:
    """Returns a folder that was named; an empty name is none, and not the current folder."""
    return Path(text) if text else None


def named(state_dir: Path | None) -> Path:
    """Returns the state directory that was named.

    Raises:
        SettingsInvalid: If none was.
    """
    if state_dir is None:
        raise SettingsInvalid(f"--state-dir is missing (or {VARIABLE})")
    return state_dir


def existing(state_dir: Path | None) -> Path:
    """Returns the state directory that was named, which must be there.

    Raises:
        SettingsInvalid: If none was named.
        StateInvalid: If it is not there.
    """
    path = named(state_dir)
    if not path.is_dir():
        raise StateInvalid(f"there is no state directory {path}; no client was enrolled or started with it")
    return path
