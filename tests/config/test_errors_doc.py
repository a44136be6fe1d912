"""docs/errors.md lists every error there is, with its true status; so do the comments of the protos."""

import re
from pathlib import Path

import pytest

from fedpeft.errors import FedpeftError, LocalError, VersionNotFound, tree

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
WIRE, LOCAL = PAGE.split("## On this machine only")
TREE = [cls for cls in tree() if cls.__module__.startswith("fedpeft.errors.")]
LEAVES = {cls.reason: cls for cls in TREE if not cls.__subclasses__() or cls is VersionNotFound}  # raised itself, too


def rows(text: str) -> list[list[str]]:
    """The cells of every table row that begins with a reason."""
    return [[c.strip() for c in r.strip("|").split("|")] for r in re.findall(r"^\| `.*\|$", text, re.M)]


def listed(text: str) -> list[str]:
    return [row[0].strip("`") for row in rows(text)]


def test_every_error_is_listed_once_and_where_it_belongs() -> None:
    local = {reason for reason, cls in LEAVES.items() if issubclass(cls, LocalError)}
    assert sorted(listed(LOCAL)) == sorted(local)
    assert sorted(listed(WIRE)) == sorted(set(LEAVES) - local)


@pytest.mark.parametrize("row", rows(WIRE), ids=listed(WIRE))
def test_a_row_names_the_status_and_says_when_and_what_to_do(row: list[str]) -> None:
    reason, status, when, action = row
    assert status == LEAVES[reason.strip("`")].status
    assert len(when) > 10 and len(action) > 10


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    import fedpeft.errors as module

    drawn = re.findall(r"[├└]── (\w+)", module.__doc__ or "")
    assert sorted(drawn) == sorted(cls.__name__ for cls in TREE if cls is not FedpeftError)


def test_the_protos_name_only_reasons_that_exist_with_their_status() -> None:
    found = 0
    for proto in (ROOT / "protos" / "fedpeft" / "v1").glob("*_service.proto"):
        for status, reasons in re.findall(
            r"^ *// +([A-Z]+_?[A-Z]+(?:_[A-Z]+)*) {2,}([A-Z_]+(?:, [A-Z_]+)*)", proto.read_text(), re.M
        ):
            for reason in reasons.split(", "):
                assert LEAVES[reason].status == status, f"{proto.name}: {reason} is not {status}"
                found += 1
    assert found > 40, "the pattern no longer finds the protos' error lines"
