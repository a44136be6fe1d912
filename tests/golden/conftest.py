"""The kept results; with FEDPEFT_RECORD_GOLDEN they are written anew."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("results.json")


class Golden:
    """The kept results by name; with `record` what is measured takes their place."""

    def __init__(self, kept: dict[str, Any], record: bool) -> None:
        self.kept = kept
        self.record = record

    def holds(self, name: str, measured: Any) -> bool:
        """Tells whether a result is the kept one."""
        if self.record:
            self.kept[name] = json.loads(json.dumps(measured))
        return bool(self.kept[name] == json.loads(json.dumps(measured)))


@pytest.fixture(scope="session")
def golden() -> Iterator[Golden]:
    record = "FEDPEFT_RECORD_GOLDEN" in os.environ
    assert not (record and "PYTEST_XDIST_WORKER" in os.environ), "record with -n 0: workers would overwrite each other"
    found = Golden(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}, record)
    yield found
    if record:
        RESULTS.write_text(json.dumps(found.kept, indent=1, sort_keys=True) + "\n")
