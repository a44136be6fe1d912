"""Servers that share a database, and a folder or a bucket, at a clock of the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpeft_server import clock as database_clock
from fedpeft_server.runs import aggregation
from fedpeft_server.store.store import Store
from fedpeft_server.timing import TIMING

from .two_servers import Clock, Cluster


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (database_clock, aggregation):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def cluster(tmp_path: Path, url: str, clock: Clock, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """SQLite with folders, or PostgreSQL with an S3."""
    place = request.getfixturevalue("s3") if url.startswith("postgresql") else tmp_path.as_uri()
    shared = f"{place}/versions", f"{place}/updates"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    stores = [Store(folder, url, *shared, keep_updates=False, timing=TIMING) for folder in folders]
    yield Cluster(stores, clock)
    for store in stores:
        store.close()
