"""Findings of a check: one sentence each, with what to do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from fedpeft import formatting
from fedpeft.formatting import counted

STRAY = "it is of another database, or left by a kill"
READABLE = "make it readable, and check again"
"""Cure of a file that may be well, but could not be read."""


class Level(StrEnum):
    """Weight of a finding."""

    FAULT = "fault"
    """Something is lost, or not what was written."""
    NOTE = "note"
    """Something that should be known, and harms nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found.

    Attributes:
        level: Its weight.
        what: The thing: a file, a key, a run with a number.
        found: Fault of it.
        cure: Advice.
    """

    level: Level
    what: str
    found: str
    cure: str

    @property
    def line(self) -> str:
        """The finding as one line."""
        return f"{self.level}  {self.what}: {self.found}; {self.cure}"


@dataclass(frozen=True, slots=True)
class FolderUse:
    """A folder of the server: the size of its files, and the free space and size of its file system, in bytes."""

    folder: str
    used_bytes: int
    free_bytes: int
    size_bytes: int

    @property
    def line(self) -> str:
        """The use as one line."""
        used, free, whole = (formatting.size(each) for each in (self.used_bytes, self.free_bytes, self.size_bytes))
        return f"{self.folder}: {used} in use, {free} free of {whole}"


@dataclass
class Report:
    """Result of a check.

    Attributes:
        findings: In the order in which they were found.
        looked_at: Number of things of each kind that were looked at.
        disks: The folders of this machine, with what is in use there and free.
    """

    findings: list[Finding] = field(default_factory=list)
    looked_at: Counter[str] = field(default_factory=Counter)
    disks: list[FolderUse] = field(default_factory=list)

    def fault(self, what: str, found: str, cure: str) -> None:
        """Adds a fault."""
        self.findings.append(Finding(Level.FAULT, what, found, cure))

    def note(self, what: str, found: str, cure: str) -> None:
        """Adds a note."""
        self.findings.append(Finding(Level.NOTE, what, found, cure))

    def number(self, level: Level) -> int:
        """Returns how many findings have a weight."""
        return sum(finding.level is level for finding in self.findings)

    @property
    def summary(self) -> str:
        """The last line: what was looked at, and how many findings there are."""
        kinds = ("run", "version", "state", "update", "record", "audit entry")
        looked = ", ".join(_counted(self.looked_at[kind], kind) for kind in kinds)
        if removed := self.looked_at["removed version"]:
            looked += f", {counted(removed, 'version')} that the retention removed"
        faults, notes = (self.number(level) for level in (Level.FAULT, Level.NOTE))
        return f"checked {looked}: {counted(faults, 'fault')}, {counted(notes, 'note')}"

    def as_json(self) -> dict[str, Any]:
        """Returns all of it for JSON."""
        findings, disks = ([asdict(each) for each in found] for found in (self.findings, self.disks))
        faults, checked = self.number(Level.FAULT), dict(self.looked_at)
        return {"faults": faults, "findings": findings, "checked": checked, "disks": disks}


def _counted(number: int, kind: str) -> str:
    return f"{number} audit entries" if kind == "audit entry" and number != 1 else counted(number, kind)
