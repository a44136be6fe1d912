"""Local algorithms with state over the network: a killed client goes on with it, to the bits of a simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpeft import simulation
from fedpeft.config import load_run_file
from fedpeft.rounds import state_machine

from ..run_files import TINY_MODEL
from .conftest import Federation, SlowLink, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.timeout(600)]

RUN_FILE = f"""
name = "state"
{TINY_MODEL}
[peft]
method = "full"
[rounds]
count = 3
clients = 2
quorum = 2
deadline_s = 300
seed = 5
[training]
steps = 6
batch_size = 4
learning_rate = 0.05
schedule = "cosine"
final_factor = 0.3
clip_gradient_norm = 5.0
momentum = 0.0
"""
ALGORITHMS = {
    "scaffold-control": """
[training.algorithm]
name = "scaffold"
population = 2
""",
    "feddyn-multiplier": """
[training.algorithm]
name = "feddyn"
alpha = 0.1
[aggregation]
strategy = "feddyn"
population = 2
[codec]
error_feedback = false
""",
}
"""By the group of state that a client keeps."""
SLOW = 1_000_000
"""Bytes a second on the slow link: an update and its control variate take some seconds."""


def simulated(run_file: Path, federation: Federation, name: str) -> dict[str, np.ndarray]:
    clients = {name: federation.folder / name / "data.parquet" for name in ("alice", "bob")}
    simulation.simulate(load_run_file(run_file), clients, federation.folder / name)
    return load_file(federation.folder / name / "adapter.safetensors")


@pytest.mark.parametrize("group", ALGORITHMS)
def test_a_killed_client_keeps_its_state(federation: Federation, group: str) -> None:
    federation.run_file.write_text(RUN_FILE + ALGORITHMS[group])
    federation.server()
    link = SlowLink(federation.port, SLOW)
    federation.client("bob")
    alice = federation.client("alice", link.port)
    run = federation.create()
    ticket = state_machine.ticket_id(run, 1, "alice")
    wait_for(lambda: federation.partial_upload(300_000, ticket), "an upload under way", 0.005)
    federation.kill(alice)  # its state of round 1 is in the outbox, and takes effect with the receipt
    pending = {file.name for file in (federation.folder / "alice" / "state" / "pending").iterdir()}
    assert {f"{group}_if_counted.safetensors", f"{group}_if_not.safetensors"} <= pending
    link.hurry.set()
    again = federation.client("alice", link.port)
    wait_for(lambda: [e for e in again.events("training begins") if e["round"] == 3], "its last training", 0.005)
    federation.kill(again)
    assert [line["round"] for line in again.events("training begins")] == [2, 3]
    federation.client("alice", link.port)
    found = federation.finish(run)
    link.close()

    alone = simulated(federation.run_file, federation, "simulated")
    control = {name for name in alone if name.startswith("control/")}
    assert bool(control) is (group == "scaffold-control")
    assert all(np.abs(alone[name]).max() > 0 for name in control if "qkv.weight" in name)
    assert found.keys() == alone.keys()
    assert [name for name in found if found[name].tobytes() != alone[name].tobytes()] == []

    plain_file = federation.folder / "plain.toml"
    plain_file.write_text(RUN_FILE)
    plain = simulated(plain_file, federation, "plain")
    assert not np.array_equal(plain["head.weight"], alone["head.weight"]), "the correction has an effect"
