"""Words of somebody else, before a person reads them: a terminal obeys some characters in place of showing them."""

from __future__ import annotations

import io
import sys

MAX_REASON = 1024
"""Most characters of why a ticket is given back, a run paused or stopped, an identity revoked."""


IN_SHORT = 160
"""Most characters of a reason where it stands among others."""


def print_anything() -> None:
    """Makes standard output take every text: a path that is not UTF-8 is printed escaped, and raises nothing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def plain(text: str) -> str:
    """Returns a text with a space for each character that is not shown: escape sequences, line ends, overrides."""
    return "".join(each if each.isprintable() else " " for each in text)


def in_short(reason: str) -> str:
    """Returns the first clause of a reason: its name and the cause, without what to do about it."""
    first = reason.partition(";")[0].rstrip()
    return first if len(first) <= IN_SHORT else f"{first[: IN_SHORT - 3]}..."
