"""The rules are valid, every alert was seen to fire and to keep still, and has a chapter in the runbook."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from typer.main import get_command

from fedpeft_operator.app import app

from ..docs.test_help import parse
from .conftest import PROMETHEUS, ROOT, Rule, alerts, program, rules

RUNBOOK = ROOT / "docs" / "runbook.md"


def cases() -> list[dict[str, Any]]:
    """Returns what promtool's tests expect, one for each alert and moment."""
    found = []
    for file in sorted((PROMETHEUS / "tests").glob("*.yml")):
        for test in yaml.safe_load(file.read_text())["tests"]:
            found += test.get("alert_rule_test", [])
    return found


def test_promtool_takes_configuration_and_rules() -> None:
    command = [program("promtool"), "check", "config", str(PROMETHEUS / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(list((PROMETHEUS / 'rules').glob('*.yml')))} rule files found" in done.stdout


def test_alerts_fire_and_keep_still_as_they_should() -> None:
    files = sorted(str(file) for file in (PROMETHEUS / "tests").glob("*.yml"))
    done = subprocess.run([program("promtool"), "test", "rules", *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("SUCCESS") == len(files) > 0


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    fires = {case["alertname"] for case in cases() if case["exp_alerts"]}
    still = {case["alertname"] for case in cases() if not case["exp_alerts"]}
    names = {alert.name for alert in alerts()}
    assert fires == names
    assert still == names


def test_names_are_used_once_and_alerts_say_how_urgent_they_are() -> None:
    names = [rule.name for rule in rules()]
    assert len(names) == len(set(names))
    for alert in alerts():
        assert alert.raw["labels"]["severity"] in ("critical", "warning"), alert.name
        assert alert.raw["annotations"]["summary"], alert.name


def anchors() -> dict[str, str]:
    """Returns the chapters of the runbook by the anchors that GitHub and MkDocs give their headings."""
    parts = re.split(r"^## (.+)$", RUNBOOK.read_text(encoding="utf-8"), flags=re.M)
    return {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-"): text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_alert_has_a_chapter_that_says_what_it_means_what_to_look_at_and_what_to_do() -> None:
    chapters = anchors()
    for alert in alerts():
        page, _, anchor = alert.raw["annotations"]["runbook_url"].partition("#")
        assert ROOT / page == RUNBOOK
        assert anchor == alert.name.lower()
        for part in ("**What it means.**", "**Look.**", "**Do.**"):
            assert part in chapters[anchor], (alert.name, part)
    assert {anchor for anchor in chapters if anchor.startswith("fedpeft")} == {a.name.lower() for a in alerts()}


def test_the_runbook_names_thresholds_as_the_rules_have_them() -> None:
    chapters = anchors()
    for alert in alerts():
        assert f"`{short(alert)}`" in chapters[alert.name.lower()], (alert.name, short(alert))


def short(alert: Rule) -> str:
    """Returns an alert's severity and patience as the runbook shows them."""
    wait = alert.raw.get("for")
    return alert.raw["labels"]["severity"] + (f", for {wait}" if wait else ", at once")


def commands() -> list[str]:
    """Returns every command line of the runbook that begins with fedpeft, in blocks and in sentences."""
    text = RUNBOOK.read_text(encoding="utf-8")
    return sorted({*re.findall(r"^\$ (fedpeft .+)$", text, re.M), *re.findall(r"`(fedpeft [^`]+)`", text)})


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_runbook_are_commands(line: str) -> None:
    words = shlex.split(line)[1:]
    command = parse(get_command(app), words, "fedpeft")
    assert command == " ".join(["fedpeft", *words])[: len(command)]
