"""Seats: clients that wait with other daemons on the same database, as those tell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seat:
    """A waiting trainer: the run that it waits for, empty for any, and those that it left out."""

    run: str
    left_out: frozenset[str]

    def is_for(self, run: str) -> bool:
        """Returns True if the client waits for a run."""
        return self.run in ("", run) and run not in self.left_out


class SeatsElsewhere:
    """Clients that wait with other daemons; one may wait with several for a moment, as it goes from one to the next."""

    def __init__(self) -> None:
        self._by_client: dict[str, dict[str, Seat]] = {}
        self._by_daemon: dict[str, set[str]] = defaultdict(set)

    def put(self, daemon: str, client: str, seat: Seat | None) -> None:
        """Notes that a client waits with a daemon; with None that it does no more."""
        if seat is not None:
            self._by_client.setdefault(client, {})[daemon] = seat
            self._by_daemon[daemon].add(client)
        elif daemon in self._by_client.get(client, {}):
            del self._by_client[client][daemon]
            self._by_daemon[daemon].discard(client)
            if not self._by_client[client]:
                del self._by_client[client]

    def vacate(self, client: str) -> None:
        """Forgets a client until a daemon tells of it again."""
        for daemon in self._by_client.pop(client, {}):
            self._by_daemon[daemon].discard(client)

    def of_daemon(self, daemon: str) -> list[str]:
        """Returns the clients that wait with a daemon."""
        return list(self._by_daemon.get(daemon, ()))

    def of(self, client: str) -> Iterable[Seat]:
        """Returns the seats of a client."""
        return self._by_client.get(client, {}).values()

    def clients(self) -> Collection[str]:
        """Returns all clients that wait elsewhere; not a copy."""
        return self._by_client.keys()
