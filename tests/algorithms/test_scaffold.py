"""SCAFFOLD: control variates that stay the mean of the clients' own, and correct every step (1910.06378)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpeft.adapters import payload
from fedpeft.adapters.sections import initial
from fedpeft.adapters.spec import TensorRole
from fedpeft.errors import ConfigInvalid
from fedpeft.models.tasks import task_of
from fedpeft.rounds.combinations import check_combination, misfits
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.training.local_round import load_run

from .quadratic import SITES, run_file

CPU = torch.device("cpu")
SCAFFOLD = {"name": "scaffold", "population": 3}
STATE = "scaffold-control"


def three(algorithm: dict[str, object] | None, rounds: dict[str, object], steps: int = 4):
    said = {"algorithm": algorithm} if algorithm else {}
    return run_file(training={"steps": steps, **said}, rounds=rounds)


@pytest.mark.usefixtures("quadratic")
def test_c_is_the_mean_of_the_clients_own_after_every_round_partial_ones_included(tmp_path) -> None:
    config = three(SCAFFOLD, {"clients": 2})
    run = load_run(config, task_of("quadratic"), None, CPU)
    assert [(t.name, t.section.divisor) for t in run.spec.tensors] == [("control/w", 3.0), ("w", None)]
    version = {**run.model.state(), **initial(run.spec)}
    kept: dict[str, dict[str, dict[str, np.ndarray]]] = {name: {} for name in SITES}
    for number, cohort in enumerate(["ab", "bc", "a", "abc", "ca", "cb"], 1):
        manifest, data = payload.encode(version, run.spec.shared, "float32")
        (tmp_path / "version").write_bytes(data)
        change = {name: np.zeros(2) for name in ("w", "control/w")}
        for name in cohort:
            job = LocalJob(name, number, number, config.training, Version(manifest, tmp_path / "version"), kept[name])
            update = run.train(job, run.dataset(SITES[name], {}))
            sent = payload.decode(update.prepared.manifest, memoryview(update.prepared.payload))
            y = version["w"] + sent["w"]
            own = kept[name].get(STATE, {"w": np.zeros(2, np.float32)})["w"]
            # option II: c_i+ = c_i - c + (x - y) / (K lr)
            after = own - version["control/w"] + (version["w"] - y) / (4 * 0.1)
            assert np.allclose(update.if_counted[STATE]["w"], after, atol=1e-5)
            assert update.if_not[STATE] == kept[name].get(STATE, {}), "an update that is not counted changes nothing"
            kept[name] = dict(update.if_counted)
            change["w"] += sent["w"] / len(cohort)
            change["control/w"] += sent["control/w"] / 3
        version = {name: (version[name] + change[name]).astype(np.float32) for name in version}
        own_mean = sum(kept[name].get(STATE, {"w": np.zeros(2)})["w"].astype(float) for name in SITES) / 3
        assert np.allclose(version["control/w"], own_mean, atol=1e-6)
        assert np.abs(version["control/w"]).max() > 0.01


@pytest.mark.usefixtures("quadratic")
def test_a_step_is_corrected_by_c_minus_the_client_s_own(tmp_path) -> None:
    config = three(SCAFFOLD, {"clients": 2}, steps=3)
    run = load_run(config, task_of("quadratic"), None, CPU)
    c, own = np.array([0.5, -1.0], np.float32), np.array([-0.25, 2.0], np.float32)
    manifest, data = payload.encode({**run.model.state(), "control/w": c}, run.spec.shared, "float32")
    (tmp_path / "version").write_bytes(data)
    job = LocalJob("c", 1, 1, config.training, Version(manifest, tmp_path / "version"), {STATE: {"w": own}})
    update = run.train(job, run.dataset(SITES["c"], {}))
    w = np.array([1.0, -2.0])
    for _ in range(3):
        w -= 0.1 * (3.0 * (w - [0.0, -1.0]) - own + c)
    sent = payload.decode(update.prepared.manifest, memoryview(update.prepared.payload))
    assert np.allclose(sent["w"], w - [1.0, -2.0], rtol=1e-5)
    assert np.allclose(sent["control/w"], update.if_counted[STATE]["w"] - own, atol=1e-6)


@pytest.mark.usefixtures("quadratic")
def test_fednova_does_not_go_with_fedprox_and_lora_s_halves_go_with_scaffold() -> None:
    config = run_file(training={"algorithm": {"name": "fedprox"}}, aggregation={"strategy": "fednova"})
    with pytest.raises(ConfigInvalid, match=r"aggregation\.strategy is 'fednova'"):
        check_combination(config, load_run(config, task_of("quadratic"), None, CPU).spec)
    lora = run_file(
        model={"name": "vit_tiny_patch16_224", "weights": "none", "image_size": 32, "depth": 1, "classes": ["a", "b"]},
        peft={"method": "rolora"},
        training={"algorithm": SCAFFOLD},
        rounds={"clients": 2},
    )
    spec = load_run(lora, task_of(""), None, CPU).spec
    assert misfits(lora, spec) == []
    by_name = {t.name: t for t in spec.tensors}
    control = [t for t in spec.tensors if t.name.startswith("control/")]
    assert control and all(t.roles == by_name[t.member].roles for t in control)
    assert any(TensorRole.FROZEN in t.roles for t in control)


def test_options_are_a_typed_table_and_unknown_ones_are_errors() -> None:
    config = run_file(training={"algorithm": SCAFFOLD})
    assert config.training.algorithm is not None and config.training.algorithm.options == {"population": 3}
    for said, text in (
        ({"name": "fedprox", "nu": 1}, "training.algorithm.nu: is not a known key"),
        ({"name": "fedprox", "mu": "a"}, "training.algorithm.mu"),
        ({"name": "scaffold"}, "training.algorithm.population: is required"),
        ({"name": "absent"}, "there is no local algorithm 'absent'; there are: feddyn, fedprox, plain, scaffold"),
        ({"name": "plain", "mu": 1.0}, "training.algorithm.mu: is not a known key"),
    ):
        with pytest.raises(ConfigInvalid, match=text):
            run_file(training={"algorithm": said})
