"""Links that the site's build does not follow: those out of docs/, and those of the pages outside it."""

import importlib.util
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")

_spec = importlib.util.spec_from_file_location("links_out", ROOT / "docs" / "links_out.py")
assert _spec is not None and _spec.loader is not None
links_out = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(links_out)


def on_a_page(markdown: str, source: str = "tutorials/page.md") -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
    return str(links_out.on_page_markdown(markdown, page=page))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from their words."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S), re.M
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_outside_the_site_link_to_what_is_there(page: str) -> None:
    broken = []
    for link in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / name) if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_a_link_out_of_the_site_becomes_a_name() -> None:
    assert on_a_page("See [CONTRIBUTING.md](../../CONTRIBUTING.md).") == "See `CONTRIBUTING.md`."
    assert on_a_page("See [how](../../CONTRIBUTING.md#habits).") == "See how (`CONTRIBUTING.md`)."
    assert on_a_page("See [errors](../errors.md#exit-codes).") == "See [errors](../errors.md#exit-codes)."
    assert on_a_page("[x](../README.md)", "errors.md") == "x (`README.md`)"


def test_a_link_out_of_the_site_to_nothing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        on_a_page("See [it](../../NOTHING.md).")
    assert "tutorials/page.md links to ../../NOTHING.md, which is not there" in caplog.text


def test_every_page_of_decisions_is_listed_for_readers_and_for_the_site() -> None:
    names = sorted(path.name for path in (ROOT / "docs" / "adr").glob("*.md"))
    assert names
    for page in ("docs/README.md", "mkdocs.yml"):
        listed = re.findall(r"adr/(\d{4}-[\w-]+\.md)", (ROOT / page).read_text(encoding="utf-8"))
        assert [name for name in listed if name in names] == names, page
