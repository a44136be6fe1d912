"""Last word of the server, for `fedpeft-client status`.

contact   the server's address; it answered last when this file was touched
refused   why it let this client in no more, if it has answered nothing else since
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from fedpeft_client.timing import TIMING, Timing

FILE, REFUSED = "contact", "refused"


class Contact:
    """Notes that the server answered.

    Args:
        folder: The state directory.
        server: HOST:PORT of the server.
        timing: The client's.
    """

    def __init__(self, folder: Path, server: str, timing: Timing = TIMING) -> None:
        self._every_s = timing.contact_s
        self._path = folder / FILE
        self._server = server
        self._touched = float("-inf")

    def note(self) -> None:
        """Notes it. A folder that cannot be written is the ledger's to say, which comes before every call."""
        if time.monotonic() - self._touched >= self._every_s:
            self._touched = time.monotonic()
            with suppress(OSError):
                self._path.touch(0o600)
                self._path.write_text(f"{self._server}\n", "utf-8")
                self._path.with_name(REFUSED).unlink(missing_ok=True)


def last(folder: Path) -> datetime | None:
    """Returns when the server answered last; None if it never did."""
    try:
        return datetime.fromtimestamp((folder / FILE).stat().st_mtime, UTC)
    except OSError:
        return None


def server(folder: Path) -> str:
    """Returns the server that answered last; empty if none did, or a release did not note it."""
    try:
        return (folder / FILE).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def note_refusal(folder: Path, why: str) -> None:
    """Notes that the server lets this client in no more; a folder that cannot be written leaves it unsaid here."""
    with suppress(OSError):
        (folder / REFUSED).write_text(f"{why}\n", "utf-8")


def refusal(folder: Path) -> tuple[datetime, str] | None:
    """Returns when and why the server let this client in no more; None if it did not, or has answered since."""
    path = folder / REFUSED
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC), path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
