"""The glossary has at most forty terms, each in one sentence, and names code that exists."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TERMS = re.findall(r"^\| ([a-z][^|]*) \| ([^|]+) \| `([\w.]+)` \|$", PAGE, re.MULTILINE)
MOST = 40


def test_the_glossary_has_at_most_forty_terms_each_of_them_once() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]  # without the head of the table
    assert 0 < len(rows) == len(TERMS) <= MOST
    assert len({term for term, _, _ in TERMS}) == len(TERMS)


@pytest.mark.parametrize(("term", "meaning", "code"), TERMS, ids=[term for term, _, _ in TERMS])
def test_a_term_is_one_sentence_and_names_code_that_exists(term: str, meaning: str, code: str) -> None:
    assert re.fullmatch(r"[A-Z][^.]*\.", meaning), f"{term}: one sentence"
    assert resolve_name(code) is not None


def test_the_glossary_is_on_the_site() -> None:
    assert "glossary.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "(glossary.md)" in (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
