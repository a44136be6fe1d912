"""Release notes are what CHANGELOG.md says of a version, no more and no less."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "release_notes.py"
CHANGELOG = """# Changelog

## Unreleased

## [0.2.0] - 2026-11-01

### Added

- Second.

## 0.1.0 - 2026-10-01

- First.
"""


def run(tmp_path: Path, version: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of the script beside a changelog of its own."""
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs" / SCRIPT.name
    copy.write_bytes(SCRIPT.read_bytes())
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG, encoding="utf-8")
    return subprocess.run([sys.executable, copy, version], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    ("version", "text"),
    [("0.2.0", "### Added\n\n- Second.\n"), ("v0.2.0", "### Added\n\n- Second.\n"), ("0.1.0", "- First.\n")],
)
def test_a_version_has_its_own_section(tmp_path: Path, version: str, text: str) -> None:
    done = run(tmp_path, version)
    assert (done.returncode, done.stdout) == (0, text)


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("0.3.0", "CHANGELOG.md has no section for 0.3.0; there are: unreleased, 0.2.0, 0.1.0"),
        ("unreleased", "CHANGELOG.md says nothing about unreleased"),
    ],
)
def test_without_notes_there_is_no_release(tmp_path: Path, version: str, sentence: str) -> None:
    done = run(tmp_path, version)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"release_notes: {sentence}\n")


def test_the_next_release_has_notes() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "unreleased"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and done.stdout.startswith("### ")
