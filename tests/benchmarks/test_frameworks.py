"""The rounds of frameworks that are timed beside each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def frameworks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import frameworks

    return frameworks


def test_a_case_is_held_against_the_bare_stream_of_its_own_turn(frameworks):
    turns = [
        {"bare stream": {"round_s": 1.0}, "FedPEFT": {"round_s": 3.0}},
        {"bare stream": {"round_s": 4.0}, "FedPEFT": {"round_s": 20.0}},
    ]
    found = frameworks.summary(turns)
    assert found["FedPEFT"] == {"round_s": 11.5, "over_bare": 4.0}
    assert found["bare stream"] == {"round_s": 2.5, "over_bare": 1.0}


def test_the_servers_word_says_when_rounds_begin(frameworks):
    class Server:
        def log(self, name):
            assert name == "server"
            return (
                "2026-11-30 20:00:01,500 - FedAvg - INFO - [identity=x] -\n      Round 0 started.      \n"
                "2026-11-30 20:00:02,000 - Other - INFO - Round robin\n"
                "2026-11-30 20:00:03,250 - FedAvg - INFO - [identity=x] - Round 1 started.\n"
            )

    peer = object.__new__(frameworks.nv_flare.NVFlare)
    peer._processes = Server()
    began = peer.began()
    assert sorted(began) == [0, 1]
    assert began[1] - began[0] == pytest.approx(1.75)


def test_the_memory_of_a_process_counts_what_it_started(frameworks, tmp_path):
    from processes import wait_for

    child = "import time; held = b'x' * 50_000_000; print('held', flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    processes = frameworks.Processes(tmp_path, dict(os.environ))
    try:
        processes.start("server", sys.executable, "-c", parent)
        wait_for(lambda: "held" in processes.log("server"), "the child")
        peaks: dict[int, int] = {}
        processes.peak_bytes("server", peaks)
    finally:
        processes.close()
    assert len(peaks) == 2
    assert max(peaks.values()) > 50_000_000


@pytest.mark.slow
def test_the_bare_stream_and_ours_are_measured(frameworks):
    measure = "print(json.dumps([measure('small', 2, 3) for measure in (frameworks.of_bare, frameworks.of_ours)]))"
    command = [sys.executable, "-c", f"import frameworks, json; {measure}"]
    said = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    bare, ours = json.loads(said.stdout)
    assert 0 < bare["round_s"] < ours["round_s"]
    assert min(bare["server_peak_bytes"], ours["server_peak_bytes"]) > 10_000_000
