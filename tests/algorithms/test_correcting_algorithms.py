"""Algorithms that correct the drift of local steps: the right optimum, where FedAvg has another, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedpeft.errors import ConfigInvalid
from fedpeft.models.tasks import task_of
from fedpeft.rounds.combinations import check_combination
from fedpeft.simulation import simulate
from fedpeft.training.local_round import load_run

from .quadratic import PLACES, SITES, one, run_file

EQUAL = {name: one(*place) for name, place in PLACES.items()}
"""Sites of one example each; those of `SITES` have not all as many, and only FedDyn's mean is not weighted."""
OPTIMUM = np.array([(4.0 - 0.5) / 4.25, (0.25 - 3.0) / 4.25])
PLAIN = {"training": {"steps": 5}, "rounds": {"count": 150, "clients": 3}}
SCAFFOLD = {"training": {"algorithm": {"name": "scaffold", "population": 3}}}
FEDDYN = {
    "aggregation": {"strategy": "feddyn", "population": 3},
    "codec": {"error_feedback": False},
    "training": {"algorithm": {"name": "feddyn", "alpha": 0.5}},
}


def merged(base, sections):
    """Returns a run file's sections with others over them; the tables of training are laid over each other."""
    training = {**base.get("training", {}), **sections.get("training", {})}
    return {**base, **sections, "training": training}


@pytest.mark.usefixtures("quadratic")
@pytest.mark.parametrize(
    ("sections", "sites", "least", "most"),
    [
        (PLAIN, EQUAL, 0.05, 2.0),
        (merged(SCAFFOLD, PLAIN), EQUAL, 0.0, 1e-3),
        (merged(FEDDYN, {"training": {"steps": 20}, "rounds": {"count": 60, "clients": 3}}), SITES, 0.0, 1e-3),
    ],
)
def test_sites_of_other_curvatures_find_the_optimum_with_them_only(tmp_path, sections, sites, least, most) -> None:
    """FedAvg of several local steps ends where the mean of the clients' steps is zero, not the mean gradient."""
    simulate(run_file(**sections), sites, tmp_path, device="cpu")
    found = load_file(tmp_path / "adapter.safetensors")["w"]
    assert least <= np.linalg.norm(found - OPTIMUM) <= most


@pytest.mark.usefixtures("quadratic")
@pytest.mark.parametrize(
    ("base", "sections", "place"),
    [
        (SCAFFOLD, {"training": {"momentum": 0.9}}, "training.momentum is 0.9"),
        (SCAFFOLD, {"training": {"optimizer": "adamw", "momentum": 0.9}}, "training.optimizer is 'adamw'"),
        (
            SCAFFOLD,
            {"rounds": {"clients": 4, "quorum": 2}},
            "training.algorithm.population is 3, fewer than the 4",
        ),
        (
            SCAFFOLD,
            {"aggregation": {"strategy": "median"}},
            "aggregation.strategy is 'median'; one that",
        ),
        (SCAFFOLD, {"codec": {"up": "sparse"}}, "codec.up is 'sparse'"),
        (SCAFFOLD, {"rounds": {"clients": 2, "policy": "buffered"}}, "rounds.policy is 'buffered'"),
        (FEDDYN, {"aggregation": {"strategy": "fedavg"}}, "aggregation.strategy is 'fedavg'; 'feddyn' is needed"),
        (FEDDYN, {"training": {"algorithm": None}}, "training.algorithm is 'plain'; 'feddyn' is needed"),
        (FEDDYN, {"training": {"algorithm": {"name": "fedprox"}}}, "training.algorithm is 'fedprox'; 'feddyn' is"),
        (FEDDYN, {"rounds": {"clients": 4, "quorum": 2}}, "aggregation.population is 3, fewer than the 4 clients"),
        (FEDDYN, {"codec": {"up": "sparse", "error_feedback": False}}, "codec.up is 'sparse'"),
        (FEDDYN, {"codec": {}}, "codec.error_feedback is true"),
        (FEDDYN, {"privacy": {"clip_norm": 1.0}}, "privacy.clip_norm would take away"),
        (FEDDYN, {"rounds": {"clients": 2, "policy": "buffered"}}, "rounds.policy is 'buffered'"),
    ],
)
def test_combinations_that_cannot_work_are_refused_when_a_run_is_created(base, sections, place) -> None:
    config = run_file(**merged({"rounds": {"clients": 2}, **base}, sections))
    spec = load_run(config, task_of("quadratic"), None, torch.device("cpu")).spec
    with pytest.raises(ConfigInvalid, match=place) as caught:
        check_combination(config, spec)
    assert caught.value.fields[0][0] == place.split(" ")[0]
