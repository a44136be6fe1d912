"""Subjects and findings of the checks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Level(StrEnum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: Subject, a word or two.
        level: Severity.
        text: The finding.
        cure: Remedy; empty if nothing is wrong.
    """

    check: str
    level: Level
    text: str
    cure: str = ""


def ok(check: str, text: str) -> Finding:
    """Returns that something is as it should be."""
    return Finding(check, Level.OK, text)


def warning(check: str, text: str, cure: str) -> Finding:
    """Returns what works, but not well, or not for long."""
    return Finding(check, Level.WARNING, text, cure)


def fault(check: str, text: str, cure: str) -> Finding:
    """Returns what does not work."""
    return Finding(check, Level.FAULT, text, cure)


@dataclass(frozen=True)
class Setup:
    """The set-up that is examined; a part that is None is left out.

    Attributes:
        server: HOST:PORT of the server, if it was named.
        identity: The identity folder, if it was named.
        data_dir: A server's data folder.
        listen: HOST:PORT that this server serves on.
        metrics: HOST:PORT of its metrics; empty: none.
        database: Its database URL; empty: SQLite in the data folder.
        blobs: Place of its adapter versions; empty: the data folder.
        state_dir: A client's state directory.
        data: A client's images.
        device: Device that a client computes on.
        image_column: The column of its images, where that has not the usual name.
        label_column: The column of their labels, likewise.
    """

    server: str | None = None
    identity: Path | None = None
    data_dir: Path | None = None
    listen: str = "127.0.0.1:7070"
    metrics: str = "127.0.0.1:9464"
    database: str = ""
    state_dir: Path | None = None
    data: Path | None = None
    device: str = "auto"
    image_column: str | None = None
    label_column: str | None = None
    blobs: str = ""

    @property
    def identity_folder(self) -> Path | None:
        """The identity in use: the one named, the client's, else the person's own where no side was named."""
        from fedpeft.identity import folder

        if self.identity is not None:
            return self.identity
        if self.state_dir is not None:
            return self.state_dir / "identity" if folder.exists(self.state_dir / "identity") else None
        own = folder.personal()
        if self.data_dir is not None or own is None or not folder.exists(own):
            return None
        return own if self.server in (None, folder.server_of(own)) else None
