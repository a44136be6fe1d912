"""Paths that the system refuses to look at: each command names the path in one sentence, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpeft_client import __main__ as client
from fedpeft_operator import app
from fedpeft_server import __main__ as server

LONG = "x" * 300
"""A name that no file system takes; a folder that may not be entered fails in the same calls, but not for root."""


def fedpeft(arguments: list[str]) -> None:
    app.main(arguments)


def fedpeft_client(arguments: list[str]) -> None:
    sys.exit(client.run(arguments))


def fedpeft_server(arguments: list[str]) -> None:
    sys.argv = ["fedpeft-server", *arguments]
    server.main()


@pytest.mark.parametrize(
    ("command", "code", "arguments"),
    [
        (fedpeft, 1, ["partition", LONG, "--clients", "2", "--out", "sites"]),
        (fedpeft_client, 1, ["--server", "127.0.0.1:1", "--name", "a", "--data", ".", "--state-dir", LONG]),
        (fedpeft_client, 1, ["status", "--state-dir", LONG]),
        (fedpeft_client, 1, ["leave", "--state-dir", LONG]),
        (fedpeft_server, 2, ["--data-dir", LONG]),
        (fedpeft_server, 2, ["--data-dir", "data", "--identity", LONG]),
        (fedpeft_server, 2, ["authority", "show", "--data-dir", LONG]),
    ],
)
def test_a_path_that_cannot_be_looked_at_is_named(
    command: Callable[[list[str]], None],
    code: int,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert said.startswith("fedpeft") and f"{LONG}" in said and "File name too long" in said
    assert "Traceback" not in said and "unexpected" not in said and "[Errno" not in said
    assert list(tmp_path.iterdir()) == []
