"""Memory of a simulation: one model for all clients, and no round leaves anything behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest

from fedpeft.models import backbones
from fedpeft.simulation import simulate

from .simulated_runs import MODEL, clients, config


def test_one_model_serves_every_client_of_every_round(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, built = backbones.build, []
    monkeypatch.setattr(backbones, "build", lambda *arguments: built.append(arguments) or real(*arguments))
    report = simulate(config(rounds={"count": 3, "clients": 4}), clients(folders), tmp_path)
    assert [len(row["clients"]) for row in report["rounds"]] == [4, 4, 4]
    assert len(built) == 1


def test_memory_does_not_grow_with_rounds(tmp_path: Path, folders: Path) -> None:
    """Six more rounds would take 48 MB if their versions of 8 MB were kept, and as much again for their updates."""
    held: list[int] = []

    def measure(_: Any) -> None:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE"))

    rounds, training = {"count": 11, "clients": 1}, {"steps": 1, "batch_size": 4}
    settings = config("full", model={**MODEL, "depth": 4}, rounds=rounds, training=training)
    report = simulate(settings, clients(folders), tmp_path, committed=measure)
    assert report["rounds"][0]["payload_bytes_up"] > 7_000_000
    assert min(held[8:]) - min(held[2:5]) < 24_000_000
