"""The page on a million devices has the figures of its script, and the simulation agrees with the formulas."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def federation(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "scaling")
    import federation

    return federation


def test_the_page_has_the_figures_of_the_script_and_the_day_agrees_with_the_formulas(federation):
    found = federation.report(federation.Scenario())
    assert federation.tables(found).strip() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    computed, simulated, peak = (found["load"][name] for name in ("computed", "simulated", "busiest minute"))
    for name in computed:
        assert simulated[name] == pytest.approx(computed[name], rel=0.05), name
        assert peak[name] > simulated[name]


def test_more_than_any_number_of_daemons_can_hold_is_said(federation):
    """Every daemon hears of each device, so a second one makes that no less: the search for their number ends."""
    s = federation.Scenario()
    load = federation.computed(s)
    found = federation.daemons_for(s, replace(load, arrivals=30 * load.arrivals))["cores"]
    cores = [
        federation.needs(s, replace(load, arrivals=30 * load.arrivals), n)["cores"] / n for n in (found - 1, found)
    ]
    assert found > 1 and cores[1] <= s.busy < cores[0]
    with pytest.raises(ValueError, match="no number of daemons"):
        federation.daemons_for(s, replace(load, arrivals=1e6 * load.arrivals))


def test_a_day_with_too_few_devices_ends(federation):
    simulation = federation.Simulation(replace(federation.Scenario(), devices=50))
    with pytest.raises(RuntimeError, match="devices are there and free"):
        simulation.run(1)


def test_an_s3_that_does_not_start_is_said_with_its_log(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "scaling")
    import unit_costs

    program = tmp_path / "moto_server"
    program.write_text("#!/bin/sh\necho no module named moto; exit 3\n")
    program.chmod(0o755)
    with pytest.raises(RuntimeError, match="no module named moto"), unit_costs.s3(tmp_path, program):
        pass


def test_the_measured_figures_of_the_page_are_those_that_are_kept(federation):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    costs = federation.COSTS
    rows = {"registration": "register", "acceptance": "accept", "version sent": "pull", "update received": "push"}
    for title, name in rows.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {title}")]
        cells = [cell.strip() for cell in row.split("|")]
        assert float(cells[2]) == pytest.approx(1000 * costs["processor_s"][name])
        assert [float(cells[3]), float(cells[4])] == [costs["statements"][name], costs["transactions"][name]]
    assert f"{costs['memory_bytes']['waiting']:,}" in page and f"{costs['memory_bytes']['known']:,}" in page
