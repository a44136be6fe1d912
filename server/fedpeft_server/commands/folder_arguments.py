"""The flags by which the commands beside the daemon are told its folders: those of the daemon itself."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from fedpeft.errors import SettingsInvalid
from fedpeft.process import flags
from fedpeft_server.access.files import Files

_PLACES: dict[str, Callable[[str], object]] = {"data_dir": Path, "identity": Path, "database": str}
"""Settings of the server that the commands have too, and what each is made of its text."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --data-dir, --identity and --config to a command."""
    flags.add_path(parser, "--data-dir", "FEDPEFT_SERVER_DATA_DIR", "the server's data folder ({})")
    said = "the folder of the certificates, if it is not identity in the data folder ({})"
    flags.add_path(parser, "--identity", "FEDPEFT_SERVER_IDENTITY", said)
    said = "the server's settings file, for what neither flags nor environment say ({})"
    flags.add_path(parser, "--config", "FEDPEFT_SERVER_CONFIG", said, metavar="FILE")


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments of a command, completed by the server's settings file if one is named.

    Of the file only the places count that the command asks for: the others of its settings may want certificates that
    this command is to make.

    Raises:
        SettingsInvalid: If the file cannot be read, or a place in it is no text.
    """
    given = parser.parse_args(arguments)
    if given.config is not None:
        from fedpeft_server.settings import Settings  # only here: the commands start without its imports

        found = Settings.load(given.config)
        for name, made in _PLACES.items():
            value = found.get(name, "")
            if not isinstance(value, str):
                raise SettingsInvalid(f"--config {given.config}: {name} is {value!r}, and no text")
            if value and hasattr(given, name) and not getattr(given, name):
                setattr(given, name, made(value))
    return given


def add_authority(parser: argparse.ArgumentParser) -> None:
    """Adds --authority and --authority-key to a command."""
    parser.add_argument("--authority", metavar="FILE", type=Path, help="certificate of an authority of your own")
    parser.add_argument("--authority-key", metavar="FILE", type=Path, help="its key, with which this server then signs")


def words(given: argparse.Namespace) -> str:
    """Returns the flags that name the same folders to another command."""
    named = (("--data-dir", given.data_dir), ("--identity", given.identity))
    return " ".join(f"{flag} {shlex.quote(str(where))}" for flag, where in named if where)


def files(given: argparse.Namespace) -> Files:
    """Returns the files of the certificates.

    Raises:
        SettingsInvalid: If neither folder was named.
    """
    if not (given.identity or given.data_dir):
        raise SettingsInvalid("--data-dir is missing (or FEDPEFT_SERVER_DATA_DIR, or --config)")
    return Files(given.identity or given.data_dir / "identity")


def existing(given: argparse.Namespace) -> Files:
    """Returns the files of the certificates of a server that has some.

    Raises:
        SettingsInvalid: If neither folder was named, or no certificates are there.
    """
    found = files(given)
    if not found.exist():
        raise SettingsInvalid(f"{found.folder} has no server.pem; fedpeft-server init makes the first certificates")
    return found
