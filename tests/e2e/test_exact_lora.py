"""Exact means of LoRA of unequal ranks over the network: bits and bytes are those of the simulation."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft import simulation
from fedpeft.aggregation.low_rank.ranks import of_rank
from fedpeft.config import load_run_file
from fedpeft.peft import spec_of

from ..run_files import TINY_MODEL
from .conftest import Federation

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.timeout(600)]

RUN_FILE = f"""
name = "exact"
{TINY_MODEL}
[peft]
method = "lora_residual"
rank = 2
residual_rank = 6
[rounds]
count = 3
clients = 2
deadline_s = 300
seed = 2
[training]
steps = 2
batch_size = 4
learning_rate = 0.05
[aggregation]
strategy = "flora"
[simulation]
ranks = [1, 99]
"""
RANKS = {"alice": 1, "bob": 2}


def test_flora_over_the_network_is_flora_simulated(federation: Federation) -> None:
    federation.run_file.write_text(RUN_FILE)
    sites = {name: federation.folder / name / "data.parquet" for name in ("alice", "bob")}
    config = load_run_file(federation.run_file)
    alone = simulation.simulate(config, sites, federation.folder / "simulated")

    federation.server(("--keep-updates",))
    for name in sites:
        federation.client(name, flags=("--rank", "1") if name == "alice" else ())
    run = federation.create()
    found = federation.finish(run)
    rounds = federation.show(run)["rounds"]
    federation.fedpeft("run", "verify", run, "--spool", str(federation.folder / "server" / "spool"))

    spec = spec_of(config.model, "lora_residual", dict(config.peft.options))
    up = sum(4 * t.size for rank in RANKS.values() for t in of_rank(spec.sent(1), rank))
    down = 2 * sum(4 * t.size for t in spec.shared)
    assert up < 2 * sum(4 * t.size for t in spec.sent(1)) < down
    for row, simulated in zip(rounds, alone["rounds"], strict=True):
        assert row["payload_bytes_up"] == simulated["payload_bytes_up"] == up
        assert row["payload_bytes_down"] == simulated["payload_bytes_down"] == down
    there = load_file(federation.folder / "simulated" / "adapter.safetensors")
    assert found.keys() == there.keys() == {t.name for t in spec.tensors}
    assert [name for name in found if not np.array_equal(found[name], there[name])] == []
    assert all(found[t.name].any() for t in spec.derived), "the residual has taken something up"
    assert not any(values.any() for name, values in found.items() if name.endswith("lora_B.weight"))
