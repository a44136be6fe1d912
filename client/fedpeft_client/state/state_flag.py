"""The flags `--state-dir` and `--identity` of commands on a state directory, and the checks of what the first names."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedpeft.errors import SettingsInvalid, StateInvalid
from fedpeft.process import flags
from fedpeft_client.state.state_dir import VARIABLE


def add(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds the flag; `more` ends its help."""
    flags.add_path(parser, "--state-dir", VARIABLE, "the client's state directory ({})" + more)


def add_identity(parser: argparse.ArgumentParser) -> None:
    """Adds the flag of an identity folder that is not in the state directory."""
    said = "its identity folder, if that is not in the state directory ({})"
    flags.add_path(parser, "--identity", "FEDPEFT_CLIENT_IDENTITY", said)


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
