"""Simulated runs with noise at the server: the budget of a server's, and no two runs alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.privacy.accounting import epsilon, noise_for
from fedpeft.rounds import record
from fedpeft.simulation import simulate

from .simulated_runs import clients, config, same, tensors

PRIVACY: dict[str, Any] = {"clip_norm": 0.01, "mechanism": "central", "delta": 1e-3}


def test_a_run_says_what_it_spent_and_draws_other_noise_every_time(tmp_path: Path, folders: Path) -> None:
    run = config(privacy={**PRIVACY, "target_epsilon": 3.0}, training={"steps": 1, "batch_size": 2})
    first = simulate(run, clients(folders), tmp_path / "first")
    z = noise_for(3.0, 1e-3, 2)
    assert first["state"] == "completed"
    assert first["privacy"]["noise_multiplier"] == first["config"]["privacy"]["noise_multiplier"] == z
    records = [record.parse(line) for line in (tmp_path / "first" / "records.jsonl").read_text().splitlines()]
    ledger = [event for _, event in record.ledger(records)]
    assert first["privacy"]["epsilon"] == epsilon(ledger, 1e-3) <= 3.0
    assert [row["metrics"]["privacy_epsilon"] for row in first["rounds"]] == [
        epsilon(ledger[:2], 1e-3),
        epsilon(ledger, 1e-3),
    ]
    simulate(run, clients(folders), tmp_path / "second")
    assert not same(tensors(tmp_path / "first")[1], tensors(tmp_path / "second")[1])


def test_a_run_ends_before_the_round_that_would_spend_too_much(tmp_path: Path, folders: Path) -> None:
    z = noise_for(3.0, 1e-3, 1)
    given = {**PRIVACY, "target_epsilon": 3.5, "noise_multiplier": z}
    report = simulate(config(privacy=given, training={"steps": 1, "batch_size": 2}), clients(folders), tmp_path)
    assert (report["state"], report["version"], report["round"]) == ("paused", 1, 2)
    assert "with round 2 epsilon would be" in report["reason"]
    assert report["privacy"]["epsilon"] == pytest.approx(3.0, abs=1e-3)
