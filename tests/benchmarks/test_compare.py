"""`make bench-compare` tells what got worse, and only that."""

from __future__ import annotations

import json

import pytest

from .test_workload import BENCHMARKS

ROW = {
    "round_over_bare": 3.0,
    "tls_over_plain": 1.2,
    "processor_over_bare": 2.0,
    "server_peak_bytes": 200e6,
    "wire_over_payload_up": 1.004,
    "wire_over_payload_down": 1.004,
}


@pytest.fixture
def compare(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compare

    monkeypatch.setattr(compare, "KEPT", tmp_path / "kept.json")
    return compare


def told(compare, monkeypatch, capsys, tmp_path, *flags, **changed):
    """Compares results in which some figures of the small payload are others; returns the exit code and the lines."""
    results = {"machine": {"cpu": "a"}, "memory": {"ratio": 1.1}, "rounds": {"small": ROW | changed, "large": ROW}}
    measured = tmp_path / "bench.json"
    measured.write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["compare.py", str(measured), *flags])
    return compare.main(), capsys.readouterr().out.splitlines()


def test_what_got_worse_by_over_a_tenth_is_said(compare, monkeypatch, capsys, tmp_path):
    assert told(compare, monkeypatch, capsys, tmp_path, "--keep")[0] == 0
    code, lines = told(compare, monkeypatch, capsys, tmp_path, round_over_bare=3.29, tls_over_plain=0.5)
    assert code == 0 and not [line for line in lines if "WORSE" in line]
    code, lines = told(compare, monkeypatch, capsys, tmp_path, round_over_bare=3.31, wire_over_payload_up=1.0045)
    worse = [line.split("  ")[0] for line in lines if "WORSE" in line]
    assert (code, worse) == (1, ["small: round_over_bare", "small: wire_over_payload_up - 1"])


def test_a_figure_that_is_no_longer_measured_is_said(compare, monkeypatch, capsys, tmp_path):
    told(compare, monkeypatch, capsys, tmp_path, "--keep")
    kept = json.loads(compare.KEPT.read_text())
    kept["figures"]["small: older"] = 1.0
    compare.KEPT.write_text(json.dumps(kept))
    code, lines = told(compare, monkeypatch, capsys, tmp_path)
    assert code == 1 and any("small: older" in line and "no longer measured" in line for line in lines)
