"""Docstrings begin with the thing or the verb, a question hides both; the arguments and attributes they name exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
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


ENTRY = re.compile(r" +[\w, *`]+?(?: \([^)]*\))?: +(?P<words>\S.*)")


def asking_entries(source: str) -> list[str]:
    """Returns the entries of arguments, attributes and results that begin with the word of a question."""
    return [entry for _, text in docstrings(source) for entry in described(text) if _asks(entry)]


def described(docstring: str) -> Iterator[str]:
    """Yields the descriptions in the sections of a docstring: of each argument, each attribute and the result."""
    indent, section = 0, ""
    for line in docstring.expandtabs().splitlines():
        deep = len(line) - len(line.lstrip())
        if line.strip() in ("Args:", "Attributes:", "Returns:", "Yields:"):
            indent, section = deep, line.strip()
        elif line.strip() and deep <= indent:
            section = ""
        elif section in ("Args:", "Attributes:") and deep == indent + 4 and (match := ENTRY.fullmatch(line)):
            yield match["words"]
        elif section in ("Returns:", "Yields:") and line.strip():
            yield line.strip()
            section = ""


def _asks(text: str) -> bool:
    return text.split(maxsplit=1)[0].strip("\"'`.,:;").lower() in QUESTIONS


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_entry_of_a_docstring_begins_with_the_word_of_a_question(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*.py") if not {"node_modules", "v1"} & set(path.parts)]
    found = {str(path.relative_to(ROOT)): lost for path in files if (lost := asking_entries(path.read_text("utf-8")))}
    assert found == {}


def test_such_an_entry_is_found() -> None:
    source = """
def f(a, b):
    '''Does.

    Args:
        a: Whether to do it.
        b (int): Number of times,
            whether or not it is done.
        *c: How many.

    Returns:
        What is left,
        when it is done.

    Raises:
        ValueError: When it rains.
    '''
"""
    assert asking_entries(source) == ["Whether to do it.", "How many.", "What is left,"]


ROOTS = ("common", "server", "client", "operator")
"""Packages whose documented arguments and attributes must exist."""
Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def entries(docstring: str, section: str) -> list[str]:
    """Returns the names that a section of a docstring describes, in its order."""
    lines = docstring.expandtabs().splitlines()
    found: list[str] = []
    for number, line in enumerate(lines):
        if line.strip() != f"{section}:":
            continue
        indent = len(line) - len(line.lstrip())
        for entry in lines[number + 1 :]:
            deep = len(entry) - len(entry.lstrip())
            if entry.strip() and deep <= indent:
                break
            if deep == indent + 4 and (match := re.match(r"\s*([\w, *`]+?)(?: \([^)]*\))?:(?:\s|$)", entry)):
                found += [name.strip("*` ") for name in match[1].split(",")]
    return found


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Returns the names of a function's parameters."""
    of = function.args
    more = [each for each in (of.vararg, of.kwarg) if each is not None]
    return {each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs, *more)}


def attributes(one: ast.ClassDef) -> set[str]:
    """Returns the names that a class gives to its instances or has itself."""
    found = {each.name for each in one.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in ast.walk(one):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in (part for each in targets for part in (each.elts if isinstance(each, ast.Tuple) else [each])):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                found.add(target.attr)
            elif isinstance(target, ast.Name) and node in one.body:
                found.add(target.id)
    return found


def undocumentable(source: str, known: Mapping[str, ast.ClassDef]) -> list[str]:
    """Returns line and name of what docstrings describe and the code has not.

    Args:
        source: The module.
        known: Classes of all modules by name, for what is inherited.
    """

    def of_class(one: ast.ClassDef, names: Callable[[ast.ClassDef], set[str]]) -> set[str]:
        bases = [known[name] for base in one.bases if (name := re.sub(r"\[.*|.*\.", "", ast.unparse(base))) in known]
        return names(one).union(*(of_class(base, names) for base in bases if base is not one))

    def made_with(one: ast.ClassDef) -> set[str]:
        makers = [f for f in one.body if isinstance(f, ast.FunctionDef) and f.name in ("__init__", "__new__")]
        fields = {f.target.id for f in one.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}
        return fields.union(*(parameters(maker) for maker in makers))

    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, Documented) or not (docstring := ast.get_docstring(node)):
            continue
        args = of_class(node, made_with) if isinstance(node, ast.ClassDef) else parameters(node)
        has = of_class(node, attributes) if isinstance(node, ast.ClassDef) else set()
        for section, names in (("Args", args), ("Attributes", has)):
            found += [f"{node.lineno} {node.name}: {name}" for name in entries(docstring, section) if name not in names]
    return found


def classes(paths: Sequence[Path]) -> dict[str, ast.ClassDef]:
    """Returns the classes of some modules by name."""
    trees = [ast.parse(path.read_text("utf-8")) for path in paths]
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def test_every_documented_argument_and_attribute_exists() -> None:
    paths = [path for root in ROOTS for path in (ROOT / root).rglob("*.py") if "v1" not in path.parts]
    known = classes(paths)
    found = {path: lost for path in paths if (lost := undocumentable(path.read_text("utf-8"), known))}
    assert {str(path.relative_to(ROOT)): lost for path, lost in found.items()} == {}


def test_an_argument_that_is_gone_is_found() -> None:
    source = """
class A:
    '''A thing.

    Args:
        a: One.
        b: Two.

    Attributes:
        c: Kept.
        d: Not kept.
    '''

    def __init__(self, a):
        self.c, self._e = a, 1

    def f(self, x, *, y):
        '''Does.

        Args:
            x: One, of
                z: deep.
            y: Two.
            gone: Three.
        '''
"""
    assert undocumentable(source, {}) == ["2 A: b", "2 A: d", "17 f: gone"]
