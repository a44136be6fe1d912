"""Three daemons on one PostgreSQL and one S3, and clients that call another of them each time."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as fed

from ..conftest import Daemon, RawClient, StartDaemon


class Federation:
    """Daemons that share a database and a bucket."""

    def __init__(self, daemons: list[Daemon]) -> None:
        self.daemons = daemons

    def client(self, name: str, instance: str | None = None) -> list[RawClient]:
        """One client's process as it calls each daemon."""
        process = secrets.token_hex(16)
        clients = [daemon.client(name, instance) for daemon in self.daemons]
        for client in clients:
            client.metadata = (*client.metadata, (wire.PROCESS_KEY, process))
        return clients

    async def clients(self, *names: str) -> list[list[RawClient]]:
        """Clients that registered, each with another daemon than the one before."""
        clients = [self.client(name) for name in names]
        for number, client in enumerate(clients):
            await client[number % len(client)].register()
        return clients

    async def until(self, reached: Callable[[Daemon], object], seconds: float = 5.0) -> None:
        """Waits until all daemons know of something."""
        async with asyncio.timeout(seconds):
            while not all(map(reached, self.daemons)):
                await asyncio.sleep(0.01)


@pytest.fixture
async def federation(
    start: StartDaemon, tmp_path: Path, migrated_postgresql_url: str, s3: str, request: pytest.FixtureRequest
) -> Federation:
    """Three daemons; those of a test with the mark `settings` with these besides."""
    marks = request.node.iter_markers("settings")
    others: dict[str, Any] = {name: value for mark in marks for name, value in mark.kwargs.items()}
    places = {**others, "database": migrated_postgresql_url, "blobs": f"{s3}/versions", "updates": f"{s3}/updates"}
    daemons = [await start(tmp_path / f"daemon-{number}", **places) for number in range(3)]
    federation = Federation(daemons)
    await federation.until(lambda daemon: len(daemon.server.presence._heard) == 2)
    return federation


async def task(client: RawClient) -> fed.TrainingTask:
    """Waits for a ticket, at most some seconds."""
    async with asyncio.timeout(10):
        return await client.task()
