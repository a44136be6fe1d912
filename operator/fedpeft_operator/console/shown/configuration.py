"""The configuration of a run, as its page shows it: the run file that would make it again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fedpeft.api.run_text import run_text
from fedpeft.errors import FedpeftError
from fedpeft.rpc import wire
from fedpeft.v1 import run_pb2

MOST_LINES = 400
"""Lines that a page shows; a run may have 100,000 classes."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A run file.

    Attributes:
        text: Its first lines.
        hidden: Lines beyond them.
        problem: Reason for which it cannot be shown; empty if it can.
    """

    text: str
    hidden: int = 0
    problem: str = ""


def whole(run: run_pb2.Run) -> str:
    """Returns the run file of a run.

    Raises:
        ConfigInvalid: If this version does not know what is in the configuration.
    """
    return _text(run.config.SerializeToString(deterministic=True))


def configuration(run: run_pb2.Run) -> Configuration:
    """Returns what a run's page shows of its configuration."""
    try:
        lines = whole(run).splitlines()
    except FedpeftError as error:
        return Configuration("", problem=f"the configuration cannot be shown by this version: {error.message}")
    return Configuration("\n".join(lines[:MOST_LINES]), max(0, len(lines) - MOST_LINES))


@lru_cache(maxsize=64)
def _text(config: bytes) -> str:
    return run_text(wire.config_from_proto(run_pb2.RunConfig.FromString(config)))
