"""The site is built without a warning, asks no other host for anything, and names only files that exist."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}
"""Elements that make a browser fetch something, and the attribute that says what."""
NAMED = re.compile(r"`((?:tests|docs|common|server|client|operator|protos|deploy|experiments|benchmarks)/[\w./-]+)`")

MADE = {"benchmarks/results/bench.json"}
"""Files that are there only once somebody made them."""

pytestmark = pytest.mark.xdist_group("site")  # what they look at is made once


class Fetches(HTMLParser):
    """Collects what a page makes a browser fetch, and pictures without words."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.wordless: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in LOADS and found.get("rel") != "canonical":
            self.addresses.append(found.get(LOADS[tag]) or "")
        if tag == "img" and not found.get("alt"):
            self.wordless.append(found.get("src") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; broken links, missing anchors and pages outside the navigation are errors.

    Not with `--quiet`: what is not logged is not counted as a warning either.
    """
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def fetched(site: Path) -> Iterator[tuple[str, Fetches]]:
    for path in sorted(site.rglob("*.html")):
        parser = Fetches()
        parser.feed(path.read_text(encoding="utf-8"))
        yield path.relative_to(site).as_posix(), parser


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    pages = dict(fetched(site))
    assert len(pages) > 20
    assert {name: [a for a in p.addresses if re.match(r"(https?:)?//", a)] for name, p in pages.items()} == {
        name: [] for name in pages
    }
    css = "\n".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"url\(['\"]?https?:[^)]*|@import[^;]*https?:", css)


def test_pictures_have_words(site: Path) -> None:
    assert {name: p.wordless for name, p in fetched(site) if p.wordless and name != "404.html"} == {}


def test_the_site_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any("quorum" in entry["text"] for entry in index["docs"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_are_there(page: Path) -> None:
    if page.name == "track-record.md":
        pytest.skip("its paths are those of the commits that it names: test_track_record.py")
    named = set(NAMED.findall(page.read_text(encoding="utf-8"))) - MADE
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_a_page_has_one_place_in_the_navigation() -> None:
    places = re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert len(places) > 20
    assert [page for page in sorted(set(places)) if places.count(page) > 1] == []
