"""Paths of the server's certificates.

authority.pem       whose certificates are taken; two while the authority is being replaced
authority.key       the authority's key; absent where certificates come from an authority elsewhere
authority-next.key  the new authority's key, while the authority is being replaced
authority-old.pem   authorities that were replaced; whose certificates are refused, and told from a stranger's
server.pem          the server's certificate, then any between it and the authority
server.key          its key
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """The files of the server's certificates in a folder."""

    folder: Path

    @property
    def authority(self) -> Path:
        """The authority's certificate."""
        return self.folder / "authority.pem"

    @property
    def authority_key(self) -> Path:
        """The authority's key, where it is here."""
        return self.folder / "authority.key"

    @property
    def next_key(self) -> Path:
        """The key of the authority that takes over, while that is under way."""
        return self.folder / "authority-next.key"

    @property
    def replaced(self) -> Path:
        """The authorities that were replaced."""
        return self.folder / "authority-old.pem"

    @property
    def server(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.pem"

    @property
    def server_key(self) -> Path:
        """The server's key."""
        return self.folder / "server.key"

    def exist(self) -> bool:
        """Returns True if the folder was made ready."""
        return self.server.exists()

    def stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Returns inode, time of change and size of each file that a server reads; None for one that is not there."""
        return tuple(map(_stamp, (self.authority, self.authority_key, self.next_key, self.server, self.server_key)))

    def leftovers(self) -> list[str]:
        """Returns the names of the files that are there without the server's certificate."""
        others = (self.server_key, self.authority_key, self.authority)
        return [] if self.exist() else [file.name for file in others if file.exists()]

    def enrols(self) -> bool:
        """Returns True if devices can enroll with it: the authority's key is here."""
        return self.exist() and self.authority_key.exists()


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:  # reading it will say why, if it is needed
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
