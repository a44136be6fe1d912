"""Flags that name a path: from the command line, else from the environment; an empty name is none."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fedpeft.process import flags


@pytest.mark.parametrize(
    ("variable", "given", "named"),
    [
        (None, [], None),
        ("", [], None),
        ("a", [], Path("a")),
        ("a", ["--folder", "b"], Path("b")),
        ("a", ["--folder", ""], None),
    ],
)
def test_a_flag_is_over_its_variable_and_an_empty_name_is_none(
    monkeypatch: pytest.MonkeyPatch, variable: str | None, given: list[str], named: Path | None
) -> None:
    monkeypatch.delenv("FEDPEFT_FOLDER", raising=False)
    if variable is not None:
        monkeypatch.setenv("FEDPEFT_FOLDER", variable)
    parser = argparse.ArgumentParser(prog="it")
    flags.add_path(parser, "--folder", "FEDPEFT_FOLDER", "the folder ({})")
    assert parser.parse_args(given).folder == named
    assert "the folder (FEDPEFT_FOLDER)" in parser.format_help()
