"""Buffered rounds held by processes, of which the daemon and a client are killed: each receipt counts once."""

from __future__ import annotations

import signal
import sqlite3
from typing import Any

import pytest

from ..simulated_time.replay import differences
from .conftest import Federation, Process, wait_for, write_site

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.usefixtures("preloaded"),
    pytest.mark.xdist_group("survival"),
    pytest.mark.timeout(600),
]

NAMES = ("alice", "bob", "carol")
RUN_FILE = """
name = "buffered"
[model]
name = "vit_tiny_patch16_224"
weights = "none"
image_size = 32
depth = 2
classes = ["cat", "dog"]
[peft]
method = "bias"
[rounds]
policy = "buffered"
count = 6
clients = 2
concurrency = 3
quorum = 1
min_available = 3
deadline_s = 300
seed = 5
[training]
steps = 8
batch_size = 4
learning_rate = 0.01
[aggregation]
strategy = "fedbuff"
"""


@pytest.fixture
def buffered(federation: Federation) -> Federation:
    write_site(federation.folder / "carol" / "data.parquet", 2)
    federation.run_file.write_text(RUN_FILE)
    return federation


def version(federation: Federation) -> int:
    with sqlite3.connect(federation.folder / "server" / "fedpeft.db") as database:
        return int(database.execute("select version from runs").fetchone()[0])


def trained(client: Process) -> int:
    return len(client.events("training begins"))


def receipts(*clients: Process) -> set[str]:
    return {line["sha256"] for client in clients for line in client.events("update received")}


def test_a_daemon_and_a_client_are_killed_and_each_receipt_counts_once(buffered: Federation) -> None:
    keep = ("--keep-updates",)
    server = buffered.server(keep)
    clients = {name: buffered.client(name) for name in NAMES}
    run = buffered.create()
    wait_for(lambda: version(buffered) >= 1, "a version", 0.02)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    again = buffered.server(keep)
    assert not again.events("run created"), "it goes on"
    before = trained(clients["carol"])
    wait_for(lambda: trained(clients["carol"]) > before or version(buffered) == 6, "carol at work", 0.005)
    first = receipts(clients["carol"])
    buffered.kill(clients["carol"])
    carol = buffered.client("carol")
    buffered.finish(run)
    shown: Any = buffered.show(run)
    counted = [t for each in shown["rounds"] for t in each["tickets"] if t["state"] == "received"]
    assert len(shown["rounds"]) == 6
    found = [ticket["payload_sha256"] for ticket in counted]
    assert len(found) == len(set(found))
    assert first | receipts(clients["alice"], clients["bob"], carol) <= set(found)
    assert list(differences(buffered.folder / "server", buffered.folder / "replay")) == []
