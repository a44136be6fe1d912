"""The page on a million devices has the figures of its script, and the simulation agrees with the formulas."""

from __future__ import annotations

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
