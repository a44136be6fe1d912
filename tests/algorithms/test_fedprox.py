"""FedProx on a quadratic, where every step has a closed form (1812.06127)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters import payload
from fedpeft.models.tasks import task_of
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.training.local_round import load_run

from .quadratic import one, run_file

CPU = torch.device("cpu")
START = np.array([1.0, -2.0])


def delta(tmp_path, algorithm=None, **training) -> np.ndarray:
    said = {"algorithm": algorithm} if algorithm else {}
    config = run_file(training={**training, **said})
    run = load_run(config, task_of("quadratic"), None, CPU)
    manifest, data = payload.encode(run.model.state(), run.spec.shared, "float32")
    (tmp_path / "version").write_bytes(data)
    job = LocalJob("a", 1, 7, config.training, Version(manifest, tmp_path / "version"))
    update = run.train(job, run.dataset(one(1.0, (3.0, 0.5), 8), {}))
    return payload.decode(update.prepared.manifest, memoryview(update.prepared.payload))["w"]


@pytest.mark.usefixtures("quadratic")
@pytest.mark.parametrize("mu", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("batch_size", [8, 3])
def test_every_step_adds_mu_times_the_distance(tmp_path, mu, batch_size) -> None:
    w = START.copy()
    for _ in range(4):
        w -= 0.1 * ((w - [3.0, 0.5]) + mu * (w - START))
    found = delta(tmp_path, {"name": "fedprox", "mu": mu}, batch_size=batch_size)
    assert np.allclose(found, w - START, rtol=1e-5)


@pytest.mark.usefixtures("quadratic")
def test_no_pull_is_fedavg_to_the_bit_and_a_strong_one_holds_the_model(tmp_path) -> None:
    plain = delta(tmp_path)
    assert np.array_equal(delta(tmp_path, {"name": "fedprox", "mu": 0.0}), plain)
    assert np.array_equal(delta(tmp_path, {"name": "plain"}), plain)
    small = {"learning_rate": 0.0009, "steps": 2000}
    weak, strong = (np.abs(delta(tmp_path, {"name": "fedprox", "mu": mu}, **small)) for mu in (10.0, 1000.0))
    assert (strong < 0.003).all() and np.allclose(weak * 11, [2.0, 2.5], rtol=1e-3)  # (t - w_t) / (1 + mu)


@pytest.mark.usefixtures("quadratic")
def test_momentum_is_of_both_gradients(tmp_path) -> None:
    found = delta(tmp_path, {"name": "fedprox", "mu": 0.5}, momentum=0.9)
    w, velocity = START.copy(), np.zeros(2)
    for _ in range(4):
        gradient = (w - [3.0, 0.5]) + 0.5 * (w - START)
        velocity = 0.9 * velocity + gradient
        w -= 0.1 * (gradient + 0.9 * velocity)  # Nesterov, as torch has it
    assert np.allclose(found, w - START, rtol=1e-5)
