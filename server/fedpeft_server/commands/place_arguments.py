"""The flags by which commands are told all places of a server's data: those of the daemon itself, and its settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedpeft_server.settings import Settings

_FLAGS = (
    ("--data-dir", "DIR", "the server's data folder (FEDPEFT_SERVER_DATA_DIR)"),
    ("--database", "URL", "its database, if that is not in the data folder (FEDPEFT_SERVER_DATABASE)"),
    ("--blobs", "PLACE", "its adapter versions, if they are not in the data folder (FEDPEFT_SERVER_BLOBS)"),
    ("--updates", "PLACE", "its object store of received updates, if it has one (FEDPEFT_SERVER_UPDATES)"),
    ("--config", "FILE", "the server's settings file; any other of its settings may be given too"),
)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds --data-dir, --database, --blobs, --updates and --config to a command."""
    for flag, metavar, said in _FLAGS:
        parser.add_argument(flag, metavar=metavar, help=said)


def settings(given: argparse.Namespace, others: Sequence[str]) -> Settings:
    """Returns the settings of the server as its own command would have them.

    Args:
        given: The flags of `add`.
        others: The rest of the command line.

    Raises:
        SettingsInvalid: If one is missing or wrong.
    """
    named = [(flag, getattr(given, flag.removeprefix("--").replace("-", "_"))) for flag, _, _ in _FLAGS]
    words = [word for flag, value in named if value is not None for word in (flag, value)]
    return Settings.read([*words, *others])
