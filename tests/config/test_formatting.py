"""Numbers in words: one thing is one thing."""

from __future__ import annotations

import pytest

from fedpeft import formatting


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 clients"), (1, "1 client"), (1.0, "1 client"), (2, "2 clients"), (8000, "8,000 clients")],
)
def test_things_are_counted_in_their_number(number: float, words: str) -> None:
    assert formatting.counted(number, "client") == words


def test_a_plural_of_its_own() -> None:
    assert formatting.counted(1, "class", "classes") == "1 class"
    assert formatting.counted(9, "class", "classes") == "9 classes"


@pytest.mark.parametrize(
    ("ratio", "words"), [(1.002, "as much"), (0.4, "0 times as much"), (13_333.4, "13,333 times as much")]
)
def test_times_as_much(ratio: float, words: str) -> None:
    assert formatting.as_much(ratio) == words
