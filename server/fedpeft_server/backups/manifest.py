"""The manifest of a backup: each file with its digest, and what is not in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedpeft.errors import StateInvalid
from fedpeft.process import durable

NAME = "backup.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Copied:
    """A file of a backup: its digest, hexadecimal, and its size."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Content of a backup.

    Attributes:
        made_at: Time of the copy of the database, seconds since the epoch; where it is elsewhere, of the last look.
        software: Version of FedPEFT that made it.
        files: By path in the backup, with `/`.
        elsewhere: Places that it does not hold, such as `postgresql://...`, which are to be copied by their own means.
        lacks: Files that the database names and that were missing or corrupt already.
        format: Of this file.
    """

    made_at: float
    software: str
    files: dict[str, Copied]
    elsewhere: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(file.size_bytes for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Writes it into a backup whose files are all there."""
        durable.write(folder / NAME, json.dumps(asdict(self), indent=1, sort_keys=True).encode())


_MANIFEST = TypeAdapter(Manifest)


def read(folder: Path) -> Manifest:
    """Reads the manifest of a backup.

    Raises:
        StateInvalid: If there is none, for the folder is no backup or the backup was interrupted; or if it is damaged.
    """
    path = folder / NAME
    try:
        found = _MANIFEST.validate_json(path.read_bytes())
    except FileNotFoundError:
        raise StateInvalid(
            f"{folder} has no {NAME}: it is no backup, or one that was interrupted; name a backup that was finished"
        ) from None
    except ValidationError as error:
        raise StateInvalid(f"{path} is damaged ({error.errors()[0]['msg']}); name another backup") from None
    if found.format != FORMAT:
        raise StateInvalid(f"{path} has format {found.format}; this version reads {FORMAT}: use the newer one")
    return found
