"""Simulated runs with noise at the server: the budget of a server's, and no two runs alike."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from fedpeft.privacy.accounting import epsilon, local_epsilon, noise_for
from fedpeft.rounds import record
from fedpeft.simulation import simulate
from fedpeft.simulation.progress_log import ProgressLog

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


class Killed(BaseException):
    """The end of a process; nothing catches it."""


def test_a_run_that_was_killed_goes_on_with_its_budget_and_showed_no_draw_that_does_not_count(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(
        privacy={**PRIVACY, "noise_multiplier": 9.0},
        rounds={"count": 3, "clients": 3},
        training={"steps": 1, "batch_size": 2},
    )
    count, real = [0], ProgressLog.committed

    def committed(log: ProgressLog, line: dict[str, Any]) -> None:
        count[0] += 1
        if count[0] == 2:  # the noise of round 2 is drawn, its version made, and it does not count yet
            raise Killed
        real(log, line)

    monkeypatch.setattr(ProgressLog, "committed", committed)
    with pytest.raises(Killed):
        simulate(run, clients(folders), tmp_path)
    info, _ = tensors(tmp_path)
    assert info.version == 1
    report = simulate(run, clients(folders), tmp_path)
    records = [record.parse(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    ledger = [event for _, event in record.ledger(records)]
    assert report["state"] == "completed" and len(ledger) == 6
    assert report["privacy"]["epsilon"] == epsilon(ledger, 1e-3)
    assert [row["metrics"]["privacy_epsilon"] for row in report["rounds"]] == [
        epsilon(ledger[: 2 * number], 1e-3) for number in (1, 2, 3)
    ]


def test_a_run_that_was_killed_after_its_last_round_of_budget_holds_no_other(tmp_path: Path, folders: Path) -> None:
    given = {**PRIVACY, "target_epsilon": 3.5, "noise_multiplier": noise_for(3.0, 1e-3, 1)}
    run = config(privacy=given, training={"steps": 1, "batch_size": 2})

    def killed(row: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        simulate(run, clients(folders), tmp_path, committed=killed)
    report = simulate(run, clients(folders), tmp_path)
    assert (report["state"], report["version"]) == ("paused", 1)


def test_clients_with_noise_of_their_own_say_nothing_of_their_data_and_stop_when_their_budget_is_spent(
    tmp_path: Path, folders: Path
) -> None:
    z = 2 * noise_for(3.0, 1e-3, 2)  # two updates of a client, and no more
    privacy = {**PRIVACY, "mechanism": "local", "noise_multiplier": z, "target_epsilon": 3.0}
    run = config(
        privacy=privacy, rounds={"count": 3, "clients": 3, "quorum": 3}, training={"steps": 1, "batch_size": 2}
    )
    names = dict(list(clients(folders).items())[:3])
    report = simulate(run, names, tmp_path)
    assert (report["state"], report["version"]) == ("paused", 2)
    tickets = report["in_progress"]["tickets"]
    assert [t["state"] for t in tickets] == ["withdrawn"] * 3
    assert all("with update 3 of this client epsilon would be" in t["reason"] for t in tickets)
    spent = [local_epsilon(z, number, 1e-3) for number in (1, 2)]
    for row, wanted in zip(report["rounds"], spent, strict=True):
        assert row["metrics"]["privacy_epsilon"] == wanted and "train_loss" not in row["metrics"]
        for ticket in row["tickets"]:
            assert ticket["metrics"]["privacy_epsilon"] == wanted
            assert not {"loss", "loss_first", "loss_last", "clip_factor", "skipped_images"} & ticket["metrics"].keys()
    assert report["privacy"]["relation"] == "replace" and report["privacy"]["epsilon"] == spent[-1]
    assert [event["kind"] for event in report["rounds"][0]["events"]] == ["locally_noised"]


@pytest.mark.parametrize("error_feedback", [True, False])
def test_an_update_that_was_late_is_paid_for_too(tmp_path: Path, folders: Path, error_feedback: bool) -> None:
    run = config(
        privacy={**PRIVACY, "mechanism": "local", "noise_multiplier": 60.0},
        rounds={"count": 4, "clients": 1, "over_selection": 1.0},
        training={"steps": 1, "batch_size": 2},
        codec={"error_feedback": error_feedback},
    )
    report = simulate(run, dict(list(clients(folders).items())[:2]), tmp_path)
    assert [sum(t["state"] == "late" for t in row["tickets"]) for row in report["rounds"]] == [1] * 4
    received = [t["client"] for row in report["rounds"] for t in row["tickets"] if t["state"] == "received"]
    last = [max(i for i, name in enumerate(received) if name == each) for each in set(received)]
    assert report["privacy"]["epsilon"] == local_epsilon(60.0, 1 + max(last), 1e-3)


def test_the_epsilon_of_a_round_is_that_of_the_client_that_spent_most_so_far(tmp_path: Path, folders: Path) -> None:
    """Also where it was not sampled again, and after the run was killed."""
    run = config(
        privacy={**PRIVACY, "mechanism": "local", "noise_multiplier": 60.0},
        rounds={"count": 4, "clients": 1, "seed": 2},
        training={"steps": 1, "batch_size": 2},
    )
    names = dict(list(clients(folders).items())[:2])

    def killed(row: dict[str, Any]) -> None:
        if row["version"] == 3:
            raise Killed

    with pytest.raises(Killed):
        simulate(run, names, tmp_path, committed=killed)
    report = simulate(run, names, tmp_path)
    said = [ticket["metrics"]["privacy_epsilon"] for row in report["rounds"] for ticket in row["tickets"]]
    assert any(later < before for before, later in itertools.pairwise(said)), "the one that spent less comes after"
    shown = [row["metrics"]["privacy_epsilon"] for row in report["rounds"]]
    assert shown == list(itertools.accumulate(said, max)) and report["privacy"]["epsilon"] == shown[-1]
