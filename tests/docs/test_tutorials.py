"""Every tutorial is walked as it stands: its files, its commands, its terminals, and what it shows of their output."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .walkthrough import Walkthrough, blocks, missing, steps

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"first-federation", "one-site", "own-data"}
"""Tutorials that start so many processes that `make docs` walks them and `make test` does not."""
ELSEWHERE = {"two-machines"}
"""Tutorials that need more than one machine; tests/e2e/test_two_machines.py goes that way, between namespaces."""
PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
    for page in sorted((ROOT / "docs" / "tutorials").glob("*.md"))
    if page.stem not in ELSEWHERE
]

pytestmark = pytest.mark.e2e


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Walkthrough]:
    made = Walkthrough(tmp_path, ROOT)
    yield made
    made.close()


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_does_what_it_says(page: Path, reader: Walkthrough) -> None:
    assert reader.follow(page.read_text(encoding="utf-8")) >= 1


def test_a_page_is_read_as_its_reader_does() -> None:
    console = "$ one \\\n  --two\nshown\n$ three\n"
    file, terminal = blocks(f'```toml title="a.toml"\nx = 1\n```\n\n```console title="Terminal 1"\n{console}```\n')
    assert (file.title, file.text, terminal.title) == ("a.toml", "x = 1\n", "Terminal 1")
    assert list(steps(terminal.text)) == [("one    --two", ["shown"]), ("three", [])]


def test_decimals_may_differ_and_words_may_not() -> None:
    output = "before\nround 3 open: a, b\nround 3 committed in 1.5 s\nafter\n"
    assert missing(["round 3 open: a, b", "round 3 committed in 20.4 s"], output) is None
    assert missing(["round 3 open: a, b", "...", "after"], output) is None
    assert missing(["round ... b"], output) is None
    assert missing(["round 3 open: a, b", "after"], output) == "after"
    assert missing(["round 3 open: a, c"], output) == "round 3 open: a, c"
