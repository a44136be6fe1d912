"""Inputs of the tests of deploy/: rules, dashboards, the metrics that the daemon has; and Prometheus' programs."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"

METRIC = re.compile(r"\b(?:[a-z_]+:)?(?:fedpeft|process|scrape)_[a-z_]+(?::\w+)?|\bup\b|\bALERTS\b")
"""A metric's name in PromQL: the daemon's, Prometheus' own, or recorded by a rule."""


@dataclass(frozen=True)
class Rule:
    """A rule of deploy/prometheus/rules: an alert, or what is recorded under a name."""

    name: str
    expr: str
    alert: bool
    raw: dict[str, Any]


def rules() -> list[Rule]:
    found = []
    for file in sorted((PROMETHEUS / "rules").glob("*.yml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                name = rule.get("alert") or rule["record"]
                found.append(Rule(name, rule["expr"].strip(), "alert" in rule, rule))
    assert found
    return found


def alerts() -> list[Rule]:
    return [rule for rule in rules() if rule.alert]


def dashboards() -> dict[str, Any]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}
    assert found
    return found


def queries() -> list[tuple[str, str]]:
    """Returns every query of every panel and variable, with where it stands."""
    found = []
    for name, board in dashboards().items():
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                series, _ = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
                found.append((f"{name}: ${variable['name']}", series))
        for panel in board["panels"]:
            found += [(f"{name}: {panel['title']}", target["expr"]) for target in panel.get("targets", [])]
    return found


def program(name: str) -> str:
    """Returns where a program of the package prometheus is; skips the test where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install prometheus")
    return found
