"""Docstrings begin with the thing or the verb: a question as the first word hides both."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "client", "common", "deploy", "docs", "experiments", "operator", "server", "tests")
QUESTIONS = frozenset(
    ("how", "what", "whatever", "when", "where", "whether", "which", "who", "whoever", "whom", "whose", "why")
)


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and text of every string that stands by itself: of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def questions(source: str) -> list[int]:
    """Returns the lines of docstrings that begin with the word of a question."""
    first = ((line, text.split(maxsplit=1)) for line, text in docstrings(source))
    return [line for line, words in first if words and words[0].strip(".,:").lower() in QUESTIONS]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_begins_with_the_word_of_a_question(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if "node_modules" not in path.parts]
    assert files
    found = {str(path.relative_to(ROOT)): lines for path in files if (lines := questions(path.read_text("utf-8")))}
    assert found == {}


def test_such_a_docstring_is_found() -> None:
    assert questions(
        '"""The thing."""\nclass A:\n    """What it is."""\n    x = 1\n    """How often, seconds."""\n'
    ) == [3, 5]
