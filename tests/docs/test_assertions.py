"""Every test asserts something itself: one that leaves it to a helper does not say what it holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ASSERTING = ("raises", "warns", "expect", "fail")
"""Calls that are assertions; so are those of NumPy and torch, `assert_...`."""


def without_assertion(source: str) -> Iterator[str]:
    """Yields the names of tests that assert nothing themselves."""
    for node in ast.walk(ast.parse(source)):
        is_test = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if is_test and not any(map(is_assertion, ast.walk(node))):
            yield node.name


def is_assertion(node: ast.AST) -> bool:
    """Returns True for an assert statement, and for a call that is as good."""
    if not isinstance(node, ast.Call):
        return isinstance(node, ast.Assert)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ASSERTING or name.startswith("assert_")


def test_every_test_asserts_something_itself() -> None:
    files = [path for path in TESTS.rglob("test_*.py") if "node_modules" not in path.parts]
    assert files
    found = {str(path.relative_to(TESTS)): names for path in files if (names := [*without_assertion(path.read_text())])}
    assert found == {}


def test_one_that_asserts_nothing_is_found() -> None:
    helped = "def test_a():\n    check(1)\ndef test_b():\n    assert check(1)\nasync def test_c(): ...\n"
    assert list(without_assertion(helped)) == ["test_a", "test_c"]
    assert list(without_assertion("def test_d():\n    with pytest.raises(E):\n        f()\n")) == []
