"""A site behind a line of 64 kbit/s, shaped by the kernel: a round comes to its end, with no setting changed."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import RUN_FILE, wait_for, write_site
from .machines import HEAD, Machines, laid

BITS_PER_S = 64_000
CHUNK_BYTES = 1024 * 1024

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with laid(tmp_path, "tc") as made:
        for machine in (made.head, made.site):
            made.run(machine, f"tc qdisc add dev wire root tbf rate {BITS_PER_S}bit burst 8kb latency 2s")
        yield made


@pytest.mark.timeout(1500)
def test_a_round_of_more_than_a_chunk_passes_a_line_of_64_kbit_s(machines: Machines, tmp_path: Path) -> None:
    """A chunk of the usual size would take two minutes, which is longer than a transfer may stand still."""
    write_site(tmp_path / "images.parquet", 1)
    text = RUN_FILE.replace("depth = 8", "depth = 1").replace("clients = 2", "clients = 1")
    text = text.replace("count = 2", "count = 1").replace("quorum = 2", "quorum = 1").replace("deadline_s = 300\n", "")
    (tmp_path / "run.toml").write_text(text + '[codec]\nup = "float16"\ndown = "float16"\n')
    machines.start(machines.head, "server.log", f"fedpeft-server --data-dir data --listen {HEAD}:7070 --insecure")
    wait_for(lambda: "serving" in (tmp_path / "server.log").read_text(), "the server", 0.2)
    fedpeft = f"fedpeft --server {HEAD}:7070 --insecure"
    run = re.findall(r"run-[0-9a-z]{12}", machines.run(machines.head, f"{fedpeft} run create run.toml"))[0]
    began = time.monotonic()
    client = f"fedpeft-client --server {HEAD}:7070 --insecure --name far --data images.parquet --state-dir state"
    machines.start(machines.site, "client.log", client)
    shown = wait_for(lambda: _completed(machines, f"{fedpeft} run show {run} --json"), "the round", 2.0, 1200)
    seconds = time.monotonic() - began
    (only,) = shown["rounds"]
    up, down = only["payload_bytes_up"], only["payload_bytes_down"]
    assert up == down > CHUNK_BYTES, "each byte of the payloads passed once"
    assert seconds > 8 * (up + down) / BITS_PER_S, "the line was as slow as it was meant to be"
    assert only["extensions"] == 0
    log = (tmp_path / "client.log").read_text()
    assert "stalled" not in log and "unavailable" not in log, log


def _completed(machines: Machines, command: str) -> dict[str, object] | None:
    shown: dict[str, object] = json.loads(machines.run(machines.head, command))
    return shown if shown["state"] == "completed" else None
