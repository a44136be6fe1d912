"""The simulators that are timed beside each other do the same work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.config import parse_config
from fedpeft.training.run_spec import spec_without_weights

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def simulators(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import simulators

    return simulators


@pytest.mark.slow
def test_the_bare_loop_and_ours_end_as_many_rounds(simulators):
    for command, more in (([sys.executable, "bare.py"], {}), ([sys.executable, "ours.py"], {"ENGINE": "inprocess"})):
        times = simulators.rounds_of(command, 2, 2, **more)
        assert len(times) == 2 and all(seconds > 0 for seconds in times)


@pytest.mark.slow
def test_a_case_that_fails_says_its_last_words(simulators):
    with pytest.raises(RuntimeError, match="there is no engine 'absent'"):
        simulators.rounds_of([sys.executable, "ours.py"], 2, 1, ENGINE="absent")


@pytest.mark.slow
def test_both_train_as_many_values():
    count = "from same_work import model, tuned; print(sum(p.numel() for p in tuned(model()).values()))"
    said = subprocess.run(
        [sys.executable, "-c", count], cwd=BENCHMARKS / "peers", capture_output=True, text=True, check=True
    )
    classes = [str(label) for label in range(10)]
    model = {"name": "vit_tiny_patch16_224", "weights": "none", "image_size": 64, "depth": 4, "classes": classes}
    spec = spec_without_weights(parse_config({"name": "n", "model": model, "peft": {"method": "bias"}}))
    assert int(said.stdout) == spec.parameters
