"""The dashboards are what the code makes, fit Grafana's schema, fill the grid, and ask for metrics that there are."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeft_server.metrics import Metrics

from .conftest import GRAFANA, METRIC, ROOT, dashboards, queries, rules
from .schema import faults

SUFFIXES = ("_total", "_bucket", "_sum", "_count", "")
OTHERS = {"up", "ALERTS"}
"""Metrics that Prometheus makes itself."""


def known() -> set[str]:
    families = Metrics().registry.collect()
    return {family.name + suffix for family in families for suffix in SUFFIXES} | OTHERS


def test_they_are_what_the_code_makes() -> None:
    done = subprocess.run(
        [sys.executable, str(GRAFANA / "generate.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert set(dashboards()) == {"federation", "clients-and-bytes", "daemon"}


def test_they_fit_the_schema() -> None:
    assert [fault for board in dashboards().values() for fault in faults(board)] == []


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("refreshh",), "5s", "refreshh is not in the schema"),
        (("panels", 1, "fieldConfig", "defaults", "unit"), 5, "unit is 5, not str"),
        (("panels", 1, "options", "graphMode"), "sparks", "'sparks', not one of"),
        (("panels", 1, "targets", 0, "expression"), "up", "expression is not in the schema"),
        (("panels", 1, "gridPos", "w"), "wide", "w is 'wide'"),
        (("templating", "list", 1, "refresh"), 7, "refresh is 7, not one of"),
    ],
)
def test_the_schema_notices(path: tuple[str | int, ...], value: object, says: str) -> None:
    board: Any = copy.deepcopy(dashboards()["daemon"])
    inner = board
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    found = faults(board)
    assert any(says in fault for fault in found), found


def test_panels_fill_the_grid_and_do_not_overlap() -> None:
    for name, board in dashboards().items():
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
            assert not cells & taken, (name, panel["title"])
            assert all(x < 24 for x, _ in cells), (name, panel["title"])
            taken |= cells
        height = max(y for _, y in taken) + 1
        assert taken == {(x, y) for x in range(24) for y in range(height)}, name
        numbers = [panel["id"] for panel in board["panels"]]
        assert numbers == sorted(set(numbers))


def test_every_panel_says_what_it_shows() -> None:
    panels = [panel for board in dashboards().values() for panel in board["panels"] if panel["type"] != "row"]
    assert len(panels) > 40
    assert all(panel["description"].rstrip().endswith(".") for panel in panels)
    assert all(panel["targets"] for panel in panels)


def test_every_metric_that_is_asked_for_exists() -> None:
    recorded = {rule.name for rule in rules() if not rule.alert}
    asked = [*queries(), *((rule.name, rule.expr) for rule in rules())]
    missing = {(where, name) for where, expr in asked for name in METRIC.findall(expr)} - {
        (where, name) for where, _ in asked for name in known() | recorded
    }
    assert missing == set()


def test_every_metric_and_every_record_is_asked_for() -> None:
    recorded = {rule.name for rule in rules() if not rule.alert}
    asked = {name for _, expr in [*queries(), *((r.name, r.expr) for r in rules())] for name in METRIC.findall(expr)}
    families = {family.name for family in Metrics().registry.collect() if family.name.startswith("fedpeft_")}
    unseen = {name for name in families if not asked & {name + suffix for suffix in SUFFIXES}}
    assert unseen == set()
    assert recorded <= asked


def mounted(compose: Path, service: str) -> dict[str, Path]:
    """Returns what stands in the service's container, by its place there."""
    volumes = yaml.safe_load(compose.read_text())["services"][service]["volumes"]
    split = [volume.split(":") for volume in volumes]
    return {parts[1]: (compose.parent / parts[0]).resolve() for parts in split if parts[0].startswith(".")}


def test_compose_puts_everything_where_it_is_looked_for() -> None:
    compose = ROOT / "deploy" / "monitoring.yml"
    there = mounted(compose, "grafana")
    provider = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "fedpeft.yml").read_text())["providers"][0]
    assert there[provider["options"]["path"]] == GRAFANA / "dashboards"
    assert (there["/etc/grafana/provisioning"] / "dashboards" / "fedpeft.yml").is_file()
    source = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    services = yaml.safe_load(compose.read_text())["services"]
    assert source["url"].removeprefix("http://").split(":")[0] in services
    (config,) = [f for f in services["prometheus"]["command"] if f.startswith("--config.file=")]
    inside = config.partition("=")[2].removeprefix("/etc/prometheus/")
    assert (mounted(compose, "prometheus")["/etc/prometheus"] / inside).is_file()
