"""Promises 1 to 3: whoever is killed, whenever, the run ends with the same bits as the run in which nobody was."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft import simulation
from fedpeft.config import load_run_file
from fedpeft.rounds import state_machine

from .conftest import Federation, SlowLink, wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("preloaded"),
    pytest.mark.xdist_group("survival"),
    pytest.mark.timeout(600),
]

Arrays = dict[str, NDArray[np.float32]]
SLOW = 6_000_000
"""Bytes a second on the slow link: an update takes about two seconds."""


def assert_same_bits(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name].tobytes() != wanted[name].tobytes()] == []


def test_a_federation_of_processes_equals_its_simulation(undisturbed: Arrays, federation: Federation) -> None:
    clients = {name: federation.folder / name / "data.parquet" for name in ("alice", "bob")}
    out = federation.folder / "simulated"
    simulation.simulate(load_run_file(federation.run_file), clients, out)
    from safetensors.numpy import load_file

    assert_same_bits(load_file(out / "adapter.safetensors"), undisturbed)


def test_the_daemon_is_killed_in_the_middle_of_an_upload(undisturbed: Arrays, federation: Federation) -> None:
    server = federation.server()
    link = SlowLink(federation.port, SLOW)
    clients = [federation.client(name, link.port) for name in ("alice", "bob")]
    run = federation.create()
    wait_for(lambda: federation.partial_upload(2_000_000), "an upload under way", 0.005)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    held = federation.partial_upload(2_000_000)
    assert held is not None
    link.hurry.set()
    federation.server()
    assert_same_bits(federation.finish(run), undisturbed)
    offsets = [line["offset"] for client in clients for line in client.events("uploading")]
    assert any(offset >= 2_000_000 for offset in offsets), offsets
    for client in clients:
        assert [line["round"] for line in client.events("training begins")] == [1, 2]
    link.close()


def test_the_daemon_is_killed_in_the_middle_of_an_aggregation(undisturbed: Arrays, federation: Federation) -> None:
    server = federation.server()
    federation.client("alice")
    federation.client("bob")
    run = federation.create()
    scratch = federation.folder / "server" / "scratch"
    wait_for(lambda: any(scratch.glob("*/adapter")), "an aggregation under way", 0.0005)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    assert federation.phase() == "aggregating"
    again = federation.server()
    assert_same_bits(federation.finish(run), undisturbed)
    assert again.events("aggregation resumed")


def test_a_client_is_killed_in_the_middle_of_training(undisturbed: Arrays, federation: Federation) -> None:
    federation.server()
    alice = federation.client("alice")
    federation.client("bob")
    run = federation.create()
    wait_for(lambda: alice.events("training begins"), "training under way", 0.005)
    federation.kill(alice)
    assert not (federation.folder / "alice" / "state" / "pending").exists()
    again = federation.client("alice")
    assert_same_bits(federation.finish(run), undisturbed)
    assert [line["round"] for line in again.events("training begins")] == [1, 2]


def test_a_client_is_killed_in_the_middle_of_an_upload(undisturbed: Arrays, federation: Federation) -> None:
    federation.server()
    link = SlowLink(federation.port, SLOW)
    federation.client("bob")
    alice = federation.client("alice", link.port)
    run = federation.create()
    ticket = state_machine.ticket_id(run, 1, "alice")
    part: Path = wait_for(lambda: federation.partial_upload(2_000_000, ticket), "an upload under way", 0.005)
    federation.kill(alice)
    assert part.exists()
    link.hurry.set()
    again = federation.client("alice", link.port)
    assert_same_bits(federation.finish(run), undisturbed)
    assert [line["round"] for line in again.events("training begins")] == [2]
    assert again.events("uploading")[0]["offset"] >= 2_000_000
    link.close()
