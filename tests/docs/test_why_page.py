"""docs/why.md: every complaint has an answer, and every test that is named is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### (\d+)\. [^\n]+\n(.*?)(?=^##|\Z)", PAGE, re.M | re.S)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


def found_in(path: Path) -> set[str]:
    """Returns the tests of a file as pytest names them, those of a class behind its name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        before = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        functions = (each for each in inside if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
        found |= {before + each.name for each in functions if each.name.startswith("test_")}
    return found


def test_the_complaints_are_counted_and_in_order() -> None:
    assert [int(number) for number, _ in ENTRIES] == list(range(1, 29))
    assert f"Here are {len(ENTRIES)} of these complaints" in PAGE


@pytest.mark.parametrize(("number", "entry"), ENTRIES, ids=[number for number, _ in ENTRIES])
def test_a_complaint_has_a_report_an_answer_and_tests_that_are_there(number: str, entry: str) -> None:
    assert re.search(r"\]\(https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+\)", entry)
    assert entry.count("**FedPEFT**") == 1
    named = NAMED.findall(entry.partition("Tests: ")[2])
    assert named
    missing = [f"{path}::{test}" for path, test in named if test not in found_in(ROOT / path)]
    assert missing == [], "renamed, or removed: name the test that shows it now"


def test_every_test_is_named_where_it_is_looked_for() -> None:
    assert PAGE.count("::test_") == sum(len(NAMED.findall(entry.partition("Tests: ")[2])) for _, entry in ENTRIES)


def test_a_test_of_a_class_is_found_by_both_names() -> None:
    found = found_in(ROOT / "tests" / "rounds" / "test_state_machine.py")
    assert "test_rounds_and_tickets_cannot_be_changed_in_place" in found
    assert any("::test_waits_until_enough_clients_are_there" in test for test in found)
