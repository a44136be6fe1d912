"""Files and functions are of a length that one reads in one go."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "client", "common", "deploy", "docs", "experiments", "operator", "protos", "server", "tests")
GENERATED = ROOT / "common" / "fedpeft" / "v1"
LONGEST_FUNCTION, LONGEST_FILE = 70, 500
"""Lines, of a function from `def` to its last one."""


def files(folder: str) -> list[Path]:
    """Returns the Python files of a folder that are written by hand."""
    found = (ROOT / folder).rglob("*.py")
    return [path for path in found if GENERATED not in path.parents and "node_modules" not in path.parts]


def long_functions(source: str, most: int = LONGEST_FUNCTION) -> Iterator[str]:
    """Yields the functions with more lines than that, each with their number."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > most:
                yield f"{node.name}: {lines}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_function_and_no_file_is_longer_than_one_reads(folder: str) -> None:
    sources = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in files(folder)}
    assert sources
    assert {path: text.count("\n") for path, text in sources.items() if text.count("\n") > LONGEST_FILE} == {}
    assert {path: found for path, text in sources.items() if (found := list(long_functions(text)))} == {}


def test_a_long_function_is_found_wherever_it_stands() -> None:
    source = "class A:\n    async def inner(\n        self,\n    ) -> None:\n        pass\ndef outer():\n    pass\n"
    assert list(long_functions(source, 3)) == ["inner: 4"]
    assert list(long_functions(source, 4)) == []
