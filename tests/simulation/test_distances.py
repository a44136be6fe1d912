"""Squared distances of a run's tensors, against a plain calculation on its first and its last version."""

from __future__ import annotations

import numpy as np
import pytest

from fedpeft.api.initial_version import first_version
from fedpeft.simulation import simulate

from .simulated_runs import clients, config, tensors


@pytest.mark.parametrize(
    ("method", "moved"), [("head", {"head"}), ("bias", {"head", "backbone"}), ("lora", {"head", "added"})]
)
def test_distances_are_those_between_version_0_and_the_newest(tmp_path, folders, method, moved):
    settings = config(method)
    report = simulate(settings, clients(folders), tmp_path)
    first, (_, last) = first_version(settings).tensors, tensors(tmp_path)

    def squared(belongs):
        return sum(np.square(last[name].astype(float) - first[name]).sum() for name in last if belongs(name))

    found = report["squared_distances"]
    assert found["head"] == pytest.approx(squared(lambda name: name.startswith("head.")), rel=1e-12)
    assert found["added"] == pytest.approx(squared(lambda name: ".lora_" in name), rel=1e-12)
    assert sum(found.values()) == pytest.approx(squared(lambda name: True), rel=1e-12)
    assert {part for part, value in found.items() if value > 0} == moved
