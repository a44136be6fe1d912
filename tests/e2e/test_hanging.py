"""Clients that hang are pointed out within a minute, and those of a server that was away for seconds are back soon."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from .conftest import Federation, Process, wait_for

LONG = 20_000
"""Steps of a training that goes on for as long as a test."""


def _worker(agent: Process) -> int:
    """Returns the process that trains for a client."""
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text().split()
    named = [
        int(child)
        for child in children
        if b"fedpeft_client.worker.process" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    assert len(named) == 1
    return named[0]


def _clients(federation: Federation) -> dict[str, Any]:
    return {row["client"]: row for row in federation.fedpeft("client", "list")}


def _training(federation: Federation, *names: str) -> bool:
    rows = _clients(federation)
    return all((rows.get(name, {}).get("progress") or {}).get("step", 0) > 0 for name in names)


def _begin(federation: Federation, **changed: object) -> str:
    text = federation.run_file.read_text().replace("steps = 20", f"steps = {LONG}")
    for key, value in changed.items():
        text = text.replace(f"{key} = 2\n", f"{key} = {value}\n")
    federation.run_file.write_text(text)
    return federation.create()


@pytest.mark.slow
def test_a_frozen_client_and_a_frozen_training_are_shown_within_a_minute(federation: Federation) -> None:
    server = federation.server()
    alice, bob = federation.client("alice"), federation.client("bob")
    run = _begin(federation)
    wait_for(lambda: _training(federation, "alice", "bob"), "steps of both")
    frozen = {
        "alice": alice.process.pid,
        "bob": _worker(bob),
    }  # the one says nothing, the other's training stands still
    for process in frozen.values():
        os.kill(process, signal.SIGSTOP)
    since = time.monotonic()
    shown: dict[str, float] = {}
    try:
        while set(shown) != set(frozen):
            asked = time.monotonic() - since
            assert asked < 90, f"shown so far: {shown}"
            rows = _clients(federation)
            for name, state in (("alice", "silent"), ("bob", "stalled")):
                if rows[name]["progress"]["state"] == state:
                    shown.setdefault(name, asked)
        assert max(shown.values()) <= 60, shown
        assert rows["alice"]["progress"]["description"].startswith("no word for ")
        assert f"of {LONG:,} for " in rows["bob"]["progress"]["description"]
        reason = federation.show(run)["reason"]
        assert "alice (no word for " in reason and "bob (step " in reason
    finally:
        for process in frozen.values():
            os.kill(process, signal.SIGCONT)
    wait_for(
        lambda: {row["progress"]["state"] for row in _clients(federation).values()} == {"training"}, "both to be back"
    )
    # A list shows a client as it is now; the log says so at the next look at all of them.
    wait_for(lambda: len(server.events("client is back")) == len(frozen), "both to be logged")
    for event in ("client hangs", "client is back"):
        assert sorted(line["client"] for line in server.events(event)) == ["alice", "bob"]


@pytest.mark.usefixtures("preloaded")
def test_after_a_restart_of_four_seconds_clients_are_back_within_ten(federation: Federation) -> None:
    server = federation.server()
    federation.client("alice")
    _begin(federation, clients=1, quorum=1)
    wait_for(lambda: _training(federation, "alice"), "steps of the one")
    federation.client("bob")
    wait_for(lambda: _clients(federation).get("bob", {}).get("activity") == "waiting", "the other to wait")
    server.kill()
    time.sleep(4)
    again = federation.server()
    serving = datetime.fromisoformat(again.events("serving")[0]["timestamp"]).timestamp()

    def back() -> dict[str, float]:
        seen = {
            name: datetime.fromisoformat(row["last_seen"]).timestamp() for name, row in _clients(federation).items()
        }
        return seen if min(seen.values()) >= serving - 1 else {}  # it is shown in whole seconds

    seen = wait_for(back, "both to be back")
    assert max(seen.values()) - serving <= 10, seen
