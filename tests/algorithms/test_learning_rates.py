"""Rates that change from round to round, in simulated runs of quadratics, against the rounds written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft.simulation import simulate

from .quadratic import one, run_file

SITES = {"a": one(1.0, (4.0, 0.0)), "b": one(0.25, (-2.0, 1.0))}
CURVATURES, TARGETS = np.array([[1.0], [0.25]]), np.array([[4.0, 0.0], [-2.0, 1.0]])
SCHEDULE = {"schedule": "linear", "warmup_rounds": 1, "final_factor": 0.25}
RATES = 0.2 * np.array([0.5, 1.0, 0.625, 0.25])


def final(tmp_path, **sections) -> np.ndarray:
    training = {"learning_rate": 0.2, "steps": 3, **SCHEDULE, **sections.pop("training", {})}
    config = run_file(training=training, rounds={"count": 4, "clients": 2}, **sections)
    simulate(config, SITES, tmp_path, device="cpu")
    return load_file(tmp_path / "adapter.safetensors")["w"]


@pytest.mark.usefixtures("quadratic")
@pytest.mark.parametrize("strategy", ["fedavg", "fednova"])
def test_plain_rounds_have_the_rates_of_their_schedule(tmp_path, strategy) -> None:
    """Equal steps at one rate a round are FedAvg to FedNova, whatever the rate."""
    x = np.array([1.0, -2.0])
    for rate in RATES:
        y = np.tile(x, (2, 1))
        for _ in range(3):
            y -= rate * CURVATURES * (y - TARGETS)
        x = y.mean(0)
    assert np.allclose(final(tmp_path, aggregation={"strategy": strategy}), x, rtol=1e-5)


@pytest.mark.usefixtures("quadratic")
def test_scaffold_divides_by_the_rate_of_the_round(tmp_path) -> None:
    x, c, own = np.array([1.0, -2.0]), np.zeros(2), np.zeros((2, 2))
    for rate in RATES:
        y = np.tile(x, (2, 1))
        for _ in range(3):
            y -= rate * (CURVATURES * (y - TARGETS) - own + c)
        after = own - c + (x - y) / (3 * rate)
        x, c, own = y.mean(0), c + (after - own).sum(0) / 2, after
    found = final(tmp_path, training={"algorithm": {"name": "scaffold", "population": 2}})
    assert np.allclose(found, x, rtol=1e-5)


@pytest.mark.usefixtures("quadratic")
def test_a_clipped_gradient_is_the_loss_s_and_the_algorithm_s_part_comes_on_top(tmp_path) -> None:
    x, c, own = np.array([1.0, -2.0]), np.zeros(2), np.zeros((2, 2))
    clipped = 0
    for rate in RATES:
        y = np.tile(x, (2, 1))
        for _ in range(3):
            gradients = CURVATURES * (y - TARGETS)
            norms = np.linalg.norm(gradients, axis=1, keepdims=True)
            clipped += int((norms > 1.0).sum())
            y -= rate * (gradients * np.minimum(1, 1.0 / norms) - own + c)
        after = own - c + (x - y) / (3 * rate)  # the mean of the clipped gradients
        x, c, own = y.mean(0), c + (after - own).sum(0) / 2, after
    said = {"algorithm": {"name": "scaffold", "population": 2}, "clip_gradient_norm": 1.0}
    assert 0 < clipped < 24 and np.allclose(final(tmp_path, training=said), x, rtol=1e-5)


@pytest.mark.usefixtures("quadratic")
def test_a_round_says_by_which_rate_fedexp_stepped(tmp_path) -> None:
    """It is above one where the clients pull apart."""
    training = {"learning_rate": 0.2, "steps": 3}
    config = run_file(
        training=training, rounds={"count": 3, "clients": 2}, aggregation={"strategy": "fedexp", "epsilon": 1e-9}
    )
    report = simulate(config, SITES, tmp_path, device="cpu")
    x, rates = np.array([1.0, -2.0]), []
    for _ in range(3):
        y = np.tile(x, (2, 1))
        for _ in range(3):
            y -= 0.2 * CURVATURES * (y - TARGETS)
        changes = y - x
        mean = changes.mean(0)
        rates.append(max(1.0, np.square(changes).sum() / 2 / (2 * (mean @ mean + 1e-9))))
        x = x + rates[-1] * mean
    assert max(rates) > 1.01
    assert [each["metrics"]["server_learning_rate"] for each in report["rounds"]] == pytest.approx(rates, rel=1e-4)
    assert np.allclose(load_file(tmp_path / "adapter.safetensors")["w"], x, rtol=1e-4)
