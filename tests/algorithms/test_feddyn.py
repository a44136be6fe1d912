"""FedDyn, both halves: against NumPy, and h as the mean of what clients keep (2111.04263)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters import payload
from fedpeft.aggregation import Cohort, Norms, UpdateFacts, strategy
from fedpeft.models.tasks import task_of
from fedpeft.rounds.combinations import misfits
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.training.local_round import load_run

from .quadratic import PLACES, SITES, run_file

CPU = torch.device("cpu")
ALPHA = 0.5
BOTH = {
    "aggregation": {"strategy": "feddyn", "population": 3},
    "codec": {"error_feedback": False},
    "training": {"algorithm": {"name": "feddyn", "alpha": ALPHA}},
}
STATE = "feddyn-multiplier"


@pytest.mark.usefixtures("quadratic")
def test_rounds_are_those_of_the_paper_and_h_is_the_mean_of_all_lambda_partial_rounds_included(tmp_path) -> None:
    config = run_file(**BOTH, rounds={"clients": 2})
    run = load_run(config, task_of("quadratic"), None, CPU)
    rule = strategy("feddyn", {"population": 3})
    version, state = run.model.state(), {}
    kept: dict[str, dict[str, dict[str, np.ndarray]]] = {name: {} for name in SITES}
    x, h, multipliers = version["w"].astype(float), np.zeros(2), {name: np.zeros(2) for name in SITES}
    for number, cohort in enumerate(["ab", "bc", "a", "abc", "ca", "cb"], 1):
        manifest, data = payload.encode(version, run.spec.shared, "float32")
        (tmp_path / "version").write_bytes(data)
        sent, trained = [], {}
        for name in cohort:
            job = LocalJob(name, number, number, config.training, Version(manifest, tmp_path / "version"), kept[name])
            update = run.train(job, run.dataset(SITES[name], {}))
            assert update.if_not[STATE] == kept[name].get(STATE, {}), "an update that is not counted changes nothing"
            assert not update.if_not["residual"], "and is not sent again"
            kept[name] = dict(update.if_counted)
            facts, prepared = UpdateFacts(update.examples), update.prepared
            sent.append(Contribution(name, facts, prepared.manifest, memoryview(prepared.payload)))
            (curvature, target), y = PLACES[name], x.copy()
            for _ in range(4):
                y -= 0.1 * (curvature * (y - target) + ALPHA * (y - x) - multipliers[name])
            trained[name] = y
        for name, y in trained.items():
            multipliers[name] -= ALPHA * (y - x)
        h = h - ALPHA / 3 * sum(y - x for y in trained.values())
        x = sum(trained.values()) / len(trained) - h / ALPHA
        folded = fold(sent, run.spec.shared, rule, version, state)
        version, state = folded.adapter, folded.state
        assert np.allclose(version["w"], x, rtol=1e-4, atol=1e-5)
        own = {name: groups.get(STATE, {"w": np.zeros(2)})["w"].astype(float) for name, groups in kept.items()}
        assert all(np.allclose(ALPHA * own[name], each, atol=1e-5) for name, each in multipliers.items())
        assert np.allclose(state["h"]["w"], sum(own.values()) / 3, atol=1e-6)
        assert np.abs(state["h"]["w"]).max() > 0.01


def test_a_round_in_which_nobody_moves_leaves_x() -> None:
    facts = [UpdateFacts(10)] * 2
    rule = strategy("feddyn", {"population": 5}).of_round(Cohort(facts, lambda: Norms(0.0, 0.0)))
    x = np.array([1.0, -2.0])
    after, state = rule.step(x, np.zeros(2), {"h": np.zeros(2)})
    assert after.tolist() == x.tolist() and state["h"].tolist() == [0.0, 0.0]
    after, state = rule.step(x, np.array([0.5, 1.0]), {"h": np.zeros(2)})
    assert state["h"] == pytest.approx([-0.2, -0.4]) and after == pytest.approx([1.7, -0.6]), "two of five moved"


@pytest.mark.usefixtures("quadratic")
@pytest.mark.parametrize("training", [{}, {"optimizer": "adamw", "momentum": 0.9}, {"momentum": 0.9}])
def test_any_optimizer_goes_with_it_and_half_precision(training) -> None:
    said = {**BOTH, "codec": {"up": "bfloat16", "error_feedback": False}, "rounds": {"clients": 2}}
    config = run_file(**{**said, "training": {**BOTH["training"], **training}})
    assert misfits(config, load_run(config, task_of("quadratic"), None, CPU).spec) == []
