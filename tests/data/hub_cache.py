"""A cache of the Hugging Face hub as `huggingface_hub` lays it out; no network is asked."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from huggingface_hub import constants

from .test_sources import write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubCache:
    """The cache in a folder, which is the one of this process from now on."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(self, repository: str, name: str, rows: pa.Table) -> None:
        """Puts a file into the cache, as a link into `blobs` by way of a snapshot."""
        home = self.folder / f"datasets--{repository.replace('/', '--')}"
        blob = write(home / "blobs" / name.replace("/", "-"), rows)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(COMMIT)
        link = home / "snapshots" / COMMIT / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
