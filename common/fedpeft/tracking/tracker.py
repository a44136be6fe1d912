"""The interface of a tracker, and the registry by which `--track NAME` finds one."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeAlias

from fedpeft.errors import LocalError
from fedpeft.registry import Registry
from fedpeft.tracking.figures import TrackedRun

Point: TypeAlias = tuple[int, str]
"""A round's number, and the name of a figure as `Tracker.key` has it."""


class Tracker(ABC):
    """A sink of a run's figures. All calls come from one thread; any may raise anything.

    `begin` and `round` are called again after they have raised, with the next round and at the end.

    Attributes:
        module: The library that it needs.
        extra: The extra of this package that installs it.
        text: The tracker as people asked for it, see `shown`; empty where nobody did.

    Args:
        target: Place that was named, in the library's words; empty for its own choice.
        folder: Place for files where none was named.
    """

    module: ClassVar[str]
    extra: ClassVar[str]
    text: str = ""

    def __init__(self, target: str, folder: Path) -> None:
        self.target = target
        self.folder = folder

    def key(self, name: str) -> str:
        """Returns the name of a figure in this sink."""
        return name

    @abstractmethod
    def begin(self, run: TrackedRun) -> set[Point]:
        """Opens the sink for a run, new or known; returns the points that it has already."""

    @abstractmethod
    def round(self, number: int, figures: Mapping[str, float], at: float) -> None:
        """Writes figures of a round; more of the same round may follow.

        Args:
            number: Of the round; 0 for what was there before the first.
            figures: Those that the sink does not have.
            at: Time of the commit, seconds since the epoch.
        """

    @abstractmethod
    def end(self, state: str) -> None:
        """Closes the sink.

        Args:
            state: completed, paused, stopped, failed or interrupted; running if the run goes on untracked.
        """


trackers: Registry[type[Tracker]] = Registry("fedpeft.tracking", "fedpeft.trackers", "tracker")


def tracker_named(text: str, folder: Path) -> Tracker:
    """Returns the tracker that `NAME` or `NAME=TARGET` asks for.

    Args:
        text: That.
        folder: Place for files where no target is named.

    Raises:
        ConfigInvalid: If there is none of that name.
        LocalError: If its library is not installed; the message says what installs it.
    """
    name, _, target = text.partition("=")
    kind = trackers.get(name)
    if importlib.util.find_spec(kind.module) is None:
        raise LocalError(
            f"tracker {name} needs {kind.module}, which is not installed; install it with: "
            f'pip install "fedpeft[{kind.extra}]"'
        )
    tracker = kind(target, folder)
    tracker.text = shown(text)
    return tracker


def shown(text: str) -> str:
    """Returns `NAME` or `NAME=TARGET` without what may be secret in it: the user and the query of a URL."""
    return re.sub(r"\?.*", "", re.sub(r"//[^/]*@", "//", text))
