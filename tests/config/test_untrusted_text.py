"""Nothing that a terminal obeys is left of a text, and nothing else is lost."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from fedpeft.untrusted_text import plain


@given(st.text())
def test_what_is_not_shown_becomes_a_space_each(text: str) -> None:
    result = plain(text)
    assert len(result) == len(text)
    for before, after in zip(text, result, strict=True):
        assert after == (before if before.isprintable() else " ")
        assert unicodedata.category(after)[0] != "C"


def test_colours_line_ends_and_reversed_writing_are_gone_and_words_are_not() -> None:
    assert plain("\x1b[31mrot\r\nmüde \u202egnirts\u2028 日本語") == " [31mrot  müde  gnirts  日本語"
