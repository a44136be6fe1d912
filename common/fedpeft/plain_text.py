"""Words of somebody else, before a person reads them: a terminal obeys some characters in place of showing them."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Makes standard output take every text: a path that is not UTF-8 is printed escaped, and raises nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def plain(text: str) -> str:
    """Returns a text with a space for each character that is not shown: escape sequences, line ends, overrides."""
    return "".join(each if each.isprintable() else " " for each in text)
