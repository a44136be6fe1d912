"""`fedpeft-server init`: what it refuses, before it writes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.errors import SettingsInvalid
from fedpeft_server import init


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--host", "fed.example.org:7070"], "--host: 'fed.example.org:7070' is neither a host name nor an address"),
        (["--host", "fed.example.org", "--host", "0.0.0.0"], "--host 0.0.0.0 is every address of this machine"),
        (["--host", "::"], "--host :: is every address of this machine"),
        (["--operator", "a b"], "--operator: the name 'a b' must be"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(tmp_path: Path, given: list[str], said: str) -> None:
    with pytest.raises(SettingsInvalid, match=said):
        init.main(["--data-dir", str(tmp_path / "data"), "--operator-identity", str(tmp_path / "me"), *given])
    assert not list(tmp_path.iterdir())
