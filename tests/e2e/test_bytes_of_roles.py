"""RoLoRA with clipping over the network: the bytes that are predicted, and the bytes and bits of the simulation."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft import simulation
from fedpeft.config import load_run_file
from fedpeft.peft import spec_of

from ..run_files import TINY_MODEL
from .conftest import Federation, write_site

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.timeout(600)]

RUN_FILE = f"""
name = "turns"
{TINY_MODEL}
[peft]
method = "rolora"
rank = 4
[rounds]
count = 5
clients = 2
quorum = 2
min_available = 3
deadline_s = 300
seed = 2
[training]
steps = 2
batch_size = 4
learning_rate = 0.05
[privacy]
clip_norm = 0.01
"""


def test_a_round_costs_what_it_changes_and_a_client_that_missed_one_gets_both_factors(federation: Federation) -> None:
    federation.run_file.write_text(RUN_FILE)
    write_site(federation.folder / "carol" / "data.parquet", 2)
    sites = {name: federation.folder / name / "data.parquet" for name in ("alice", "bob", "carol")}
    config = load_run_file(federation.run_file)
    alone = simulation.simulate(config, sites, federation.folder / "simulated")

    federation.server()
    for name in sites:
        federation.client(name)
    run = federation.create()
    found = federation.finish(run)
    rounds = federation.show(run)["rounds"]

    spec, holds, missed = spec_of(config.model, "rolora", {"rank": 4}), dict[str, int](), 0
    for number, (row, simulated) in enumerate(zip(rounds, alone["rounds"], strict=True), 1):
        down = 0
        for client in row["clients"]:
            have = holds.get(client)
            down += sum(4 * t.size for t in (spec.shared if have is None else spec.changed(have, number - 1)))
            missed += have is not None and spec.changed(have, number - 1) == spec.shared
            holds[client] = number - 1
        assert row["clients"] == simulated["clients"]
        assert row["payload_bytes_down"] == simulated["payload_bytes_down"] == down
        up = 2 * sum(4 * t.size for t in spec.sent(number))
        assert row["payload_bytes_up"] == simulated["payload_bytes_up"] == up
        assert row["events"] == simulated["events"] == [{"kind": "clipped", "bound": 0.01, "count": 2}]
        assert all(0.0099 < t["update_norm"] <= 0.01 and t["metrics"]["clip_factor"] < 1 for t in row["tickets"])
    assert missed, "the seed lets no client miss a round"
    whole = sum(4 * t.size for t in spec.shared)
    assert sum(row["payload_bytes_down"] for row in rounds) < 0.9 * whole * 10, "today's cost: all, to each client"

    there = load_file(federation.folder / "simulated" / "adapter.safetensors")
    assert found.keys() == there.keys()
    assert [name for name in found if not np.array_equal(found[name], there[name])] == []
