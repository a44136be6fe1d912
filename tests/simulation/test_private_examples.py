"""A simulated run whose clients hide single examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.errors import ConfigInvalid
from fedpeft.privacy.example_level import Steps, example_epsilon
from fedpeft.rounds import record
from fedpeft.simulation import simulate

from .simulated_runs import clients, config

PRIVACY = {"mechanism": "example", "clip_norm": 1.0, "delta": 1e-3}


def test_each_client_has_a_budget_of_its_own_and_the_report_says_what_it_spent(tmp_path: Path, folders: Path) -> None:
    run = config(
        privacy={**PRIVACY, "target_epsilon": 2.0, "noise_multiplier": 1.5},
        rounds={"count": 3, "clients": 3, "quorum": 3},
        training={"steps": 4, "batch_size": 2},
    )
    names = dict(list(clients(folders).items())[:3])
    report = simulate(run, names, tmp_path)
    spent: dict[str, list[float]] = {}
    for number, row in enumerate(report["rounds"], 1):
        assert row["metrics"]["privacy_epsilon"] == max(t["metrics"]["privacy_epsilon"] for t in row["tickets"])
        assert "train_loss" not in row["metrics"] and "loss" not in row["tickets"][0]["metrics"]
        assert row["events"] == [{"kind": "steps_noised", "bound": 1.0, "noise_multiplier": 1.5, "count": 3}]
        for ticket in row["tickets"]:
            spent.setdefault(ticket["client"], []).append(ticket["metrics"]["privacy_epsilon"])
            wanted = example_epsilon(1.5, 2, [Steps(ticket["examples"], 4 * number)], 1e-3)
            assert ticket["metrics"]["privacy_epsilon"] == pytest.approx(wanted, abs=1e-9)
    texts = (tmp_path / "records.jsonl").read_text().splitlines()
    record.verify_chain(texts)
    for client, epsilons in spent.items():  # as an auditor may, from records and run file: of what was folded
        mine = [c for text in texts for c in record.parse(text).contributions if c.client == client]
        assert example_epsilon(1.5, 2, [Steps(c.examples, 4) for c in mine], 1e-3) == pytest.approx(
            max(epsilons), abs=1e-9
        )
    assert report["privacy"]["epsilon"] == max(max(each) for each in spent.values())
    assert (report["privacy"]["unit"], report["privacy"]["relation"]) == ("example", "add or remove one")
    assert report["state"] == "paused" and len(report["rounds"]) == 2, "the smallest client has spent its budget"
    reasons = {t["client"]: t["reason"] for t in report["in_progress"]["tickets"] if t["reason"]}
    (refused,) = reasons.values()
    assert "with round 3 of this client epsilon would be 2.461, and privacy.target_epsilon of this run is 2" in refused


def test_the_batched_engine_is_refused(tmp_path: Path, folders: Path) -> None:
    run = config(
        privacy={**PRIVACY, "noise_multiplier": 1.5},
        training={"batch_size": 2, "precision": "float32"},
        simulation={"clients": 5, "engine": "batched"},
    )
    with pytest.raises(ConfigInvalid, match=r'simulation\.engine: is "batched", which has no gradients of single'):
        simulate(run, clients(folders), tmp_path)
