"""Words of somebody else, before a person reads them: a terminal obeys some characters in place of showing them."""

from __future__ import annotations


def plain(text: str) -> str:
    """Returns a text with a space for each character that is not shown: escape sequences, line ends, overrides."""
    return "".join(each if each.isprintable() else " " for each in text)
