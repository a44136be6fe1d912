"""A spool in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft_server.store.spool import Spool


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(folder: Path) -> Spool:
    return Spool(folder)
