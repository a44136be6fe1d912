"""docs/waits.md: every test that it names is there, and every error."""

from __future__ import annotations

import re
from pathlib import Path

from fedpeft.errors import of_reason
from fedpeft.errors.local import LocalError

from .test_why_page import NAMED, found_in

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "waits.md").read_text(encoding="utf-8")


def test_every_test_is_there() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) == PAGE.count("::test_") > 0
    assert [f"{path}::{test}" for path, test in named if test not in found_in(ROOT / path)] == []


def test_every_error_is_one_that_crosses_the_network() -> None:
    reasons = re.findall(r"`([A-Z]+(?:_[A-Z]+)+)`", PAGE)
    assert reasons
    assert [reason for reason in reasons if issubclass(of_reason(reason, LocalError), LocalError)] == []
