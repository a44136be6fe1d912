"""Time of the server's last answer, for `fedpeft-client status`: the modification time of a file."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

FILE = "contact"
EVERY_S = 5.0
"""It is touched no more often."""


class Contact:
    """Notes that the server answered.

    Args:
        folder: The state directory.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._touched = float("-inf")

    def note(self) -> None:
        """Notes it. A folder that cannot be written is the ledger's to say, which comes before every call."""
        if time.monotonic() - self._touched >= EVERY_S:
            self._touched = time.monotonic()
            with suppress(OSError):
                self._path.touch(0o600)


def last(folder: Path) -> datetime | None:
    """Returns when the server answered last; None if it never did."""
    try:
        return datetime.fromtimestamp((folder / FILE).stat().st_mtime, UTC)
    except OSError:
        return None
