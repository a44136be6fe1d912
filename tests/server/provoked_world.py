"""Parts that a provocation of an error may use."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from .conftest import Daemon, RawClient, StartDaemon, config


@dataclass
class World:
    """Parts that a provocation may use."""

    start: StartDaemon
    request: pytest.FixtureRequest
    monkeypatch: pytest.MonkeyPatch

    async def run(self, clients: int = 1, **settings: object) -> tuple[Daemon, str, list[RawClient]]:
        """Starts a daemon with a run of two rounds and the clients that it waits for."""
        daemon = await self.start(**settings)
        run = await daemon.create(config(rounds={"count": 2, "clients": clients}))
        return daemon, run.id, await daemon.clients(*"abcdefgh"[:clients])
