"""The track record names commits that there are, with the test that it says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    (re.findall(r"`([0-9a-f]{7})`", row)[-1], path, name)
    for row in (ROOT / "docs" / "track-record.md").read_text(encoding="utf-8").splitlines()
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?", row)
]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no clone")
def test_each_fault_has_a_commit_with_its_test() -> None:
    if git("rev-parse", "--is-shallow-repository").strip() == "true":
        pytest.skip("the clone is shallow")
    assert len(ROWS) > 25
    for commit, path, name in ROWS:
        assert name in git("show", f"{commit}:{path}"), (commit, path, name)
