"""The words of errors, which begin small on a command line, as sentences of a page."""

from __future__ import annotations


def sentence(words: str) -> str:
    """Returns words with a capital letter and a full stop; an id at their beginning stays as it is."""
    word, space, rest = words.partition(" ")
    first = word.capitalize() if word.isalpha() and word.islower() else word
    return (first + space + rest).rstrip(".") + "."
