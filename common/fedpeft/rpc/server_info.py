"""Metadata that a server adds to every answer to a health check: its protocol and its clock."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PROTOCOL_KEY = "fedpeft-protocol"
CLOCK_KEY = "fedpeft-clock"


@dataclass(frozen=True)
class ServerInfo:
    """A server's protocol and clock.

    Attributes:
        protocol: Version of its protocol.
        clock: The server's time, in seconds since 1970.
    """

    protocol: int
    clock: float

    def to_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the entries."""
        return (PROTOCOL_KEY, str(self.protocol)), (CLOCK_KEY, f"{self.clock:.3f}")


def parse(metadata: Iterable[tuple[str, str | bytes]]) -> ServerInfo | None:
    """Returns what a server said, None if it said nothing that can be understood."""
    entries = dict(metadata)
    try:
        return ServerInfo(int(entries[PROTOCOL_KEY]), float(entries[CLOCK_KEY]))
    except (KeyError, ValueError):
        return None
