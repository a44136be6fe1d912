from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.codecs.sum128 import SUM128, ExactSum
from fedpeft.config import parse_config
from fedpeft.rounds import commit
from fedpeft.rounds.commit import RunHeader, Update, write_version
from fedpeft.rounds.folding.contributions import sum_manifest

SPEC = AdapterSpec.of("lora", [TensorSpec("head.weight", (2, 3))])
OPTIONS = {"server_learning_rate": 0.05, "beta1": 0.8, "tau": 0.01}


def header(names: tuple[str, ...]) -> RunHeader:
    config = parse_config(
        {
            "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]},
            "peft": {"method": "lora", "rank": 8.0, "alpha": 16.0},
            "aggregation": {"strategy": "fedadam", **{name: OPTIONS[name] for name in names}},
        }
    )
    return RunHeader("run-1", config, SPEC, "ab" * 32)


def test_a_version_has_the_same_bytes_in_whatever_order_the_options_came(tmp_path: Path) -> None:
    # They pass through a protobuf map, whose order is another one in every process.
    tensors = {"head.weight": np.ones((2, 3), np.float32)}
    orders = list(itertools.permutations(OPTIONS))
    assert len({write_version(header(order), tensors, tmp_path / "v").sha256 for order in orders}) == 1
    config = json.loads(header(orders[0]).info(0).extra["config"])
    assert config["aggregation"]["options"] == OPTIONS
    assert "simulation" not in config


def test_figures_beyond_all_reason_stay_finite() -> None:
    manifest, data = commit.Manifest((), 0, bytes(32)), memoryview(b"")
    updates = [Update(f"t{i}", f"c{i}", 10**9, {"loss": 1.7e308}, manifest, data) for i in range(3)]
    figures = commit._figures(updates)
    assert figures == {"train_examples": 3e9, "train_loss": pytest.approx(1.7e308)}


def test_the_norm_of_a_sum_that_was_not_measured_is_that_of_its_mean() -> None:
    total = ExactSum(6)
    for value, weight in ((3.0, 1000.0), (5.0, 3000.0)):
        total.add(np.full(6, value, np.float32), weight)
    data = SUM128.write(*total.total())
    manifest = sum_manifest(SPEC.tensors, hashlib.sha256(data).digest())
    mean, examples = 4.5, 4000
    assert Update("t", "c", examples, {}, manifest, memoryview(data)).norm == pytest.approx(mean * math.sqrt(6))
