"""Progress of a simulation on disk, from which one that was killed goes on.

    OUT/unfinished/progress.jsonl   a line with the simulation's identity, then a line for each committed round
    OUT/unfinished/...              what the next round needs: see `Versions` and `ClientMemory`

A line is what a round changed, so resuming is a fold over the lines, and a round costs the same however many there
were. Before it stands a digest of all lines so far, so that one that was changed is none. A line is durable, and so is
all that it names before it is written. A round counts once its line is whole: what a killed process left of the next
round is begun again, to the same bits. The folder is removed when the simulation ends.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from fedpeft.process import durable
from fedpeft.simulation.report import Json

UNFINISHED = "unfinished"
PROGRESS = "progress.jsonl"
MEMORY = "memory"
FORMAT = 4
"""Raised when a line, or a file beside it, means something else than before."""

log = structlog.get_logger(__name__)


class ProgressLog:
    """The progress of one simulation.

    Args:
        folder: The folder `unfinished`; made here. What another simulation left in it is removed.
        identity: All that decides the bits of the simulation, as JSON has it; an empty one is that of no other.

    Attributes:
        folder: That.
        begun: The line of the begin, without the identity; None if the simulation begins now.
        rounds: The lines of the rounds that are committed.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.begun: Json | None = None
        self.rounds: list[Json] = []
        self._file = folder / PROGRESS
        self._identity = json.loads(json.dumps({"lines": FORMAT, **identity}))
        lines, self._digest = _whole_lines(self._file)
        if lines and lines[0].pop("identity", None) == self._identity:
            self.begun, *self.rounds = lines
            log.info("simulation goes on where it was", after_round=len(self.rounds))
            return
        if lines:
            log.warning("another simulation was not finished here: what it left is removed", rounds=len(lines) - 1)
        self.clear()
        self._digest = ""
        folder.mkdir()

    def begin(self, line: Json) -> None:
        """Writes the first line."""
        self._append({"identity": self._identity, **line})
        durable.sync(self.folder)
        durable.sync(self.folder.parent)

    def committed(self, line: Json) -> None:
        """Writes the line of a round: with it the round counts."""
        self._append(line)

    def clear(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, line: Json) -> None:
        text = json.dumps(line)
        self._digest = _digest(self._digest, text)
        durable.append(self._file, f"{self._digest} {text}\n".encode("ascii"))
        durable.sync(self._file)


def _digest(before: str, text: str) -> str:
    """Returns the SHA-256 that stands before a line, hexadecimal, from that of the line before it."""
    return hashlib.sha256(f"{before} {text}".encode("ascii")).hexdigest()


def _whole_lines(file: Path) -> tuple[list[Json], str]:
    """Returns the lines that were written to their end, and the last one's digest; cuts off what was not."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return [], ""
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    lines, last = [], ""
    try:
        for number, line in enumerate(whole.decode("ascii").splitlines(), 1):
            digest, _, text = line.partition(" ")
            last = _digest(last, text)
            if digest != last:
                raise ValueError(f"line {number} is not what was written")
            lines.append(json.loads(text))
    except ValueError as error:
        log.warning("progress of a simulation cannot be read: it begins anew", file=str(file), cause=str(error))
        return [], ""
    return lines, last
