"""Forms of ids. Ids come from outside and become file names, metadata and lines on terminals."""

from __future__ import annotations

import re

CLIENT = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}")
"""A client's id, which its owner chooses; a new one does not begin with a hyphen either (`is_option`)."""
CLIENT_FORM = "1 to 64 letters, digits, dots, underscores or hyphens, and neither '.' nor '..'"
INSTANCE = re.compile(r"[0-9a-f]{32}")
"""Tells a client from another one of the same id: drawn once for each state directory."""
RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A run's id, which the server draws."""
TICKET = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A ticket's id, which the server draws."""


def is_option(name: str) -> bool:
    """Returns whether a command takes a name for an option: no new one may be so, and old ones stay good."""
    return name.startswith("-")
