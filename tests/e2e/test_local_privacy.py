"""Noise of the clients' own over the network: a killed client goes on with its budget, which outlives the run."""

from __future__ import annotations

import pytest
from safetensors.numpy import load_file

from fedpeft.privacy.accounting import local_epsilon

from ..run_files import TINY_MODEL
from .conftest import Federation, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.timeout(600)]

RUN_FILE = f"""
name = "private"
{TINY_MODEL}
[peft]
method = "head"
[rounds]
count = 3
clients = 2
quorum = 2
deadline_s = 300
[training]
steps = 2
batch_size = 4
[privacy]
mechanism = "local"
clip_norm = 1.0
target_epsilon = 4.0
delta = 1e-5
"""


def test_a_killed_client_keeps_its_budget(federation: Federation) -> None:
    federation.run_file.write_text(RUN_FILE)
    federation.server()
    federation.client("bob")
    alice = federation.client("alice")
    run = federation.create()
    wait_for(lambda: [e for e in alice.events("training begins") if e["round"] == 2], "her second training", 0.005)
    federation.kill(alice)
    federation.client("alice")
    federation.finish(run)
    shown = federation.show(run)
    z = shown["privacy"]["noise_multiplier"]
    spent = [local_epsilon(z, number, 1e-5) for number in (1, 2, 3)]
    for row, wanted in zip(shown["rounds"], spent, strict=True):
        for ticket in row["tickets"]:
            assert ticket["metrics"]["privacy_epsilon"] == wanted and "loss" not in ticket["metrics"]
    assert shown["privacy"]["epsilon"] == spent[-1] <= 4.0
    assert (shown["privacy"]["unit"], shown["privacy"]["relation"]) == ("client", "replace")
    for name in ("alice", "bob"):
        kept = load_file(federation.folder / name / "state" / "runs" / run / "privacy.safetensors")
        assert int(kept["updates"][0]) == 3, "a server that says the run is over gives nothing back"
