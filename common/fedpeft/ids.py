"""Forms of ids. Ids come from outside and become file names, metadata and lines on terminals."""

from __future__ import annotations

import re

CLIENT = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A client's id, which its owner chooses."""
CLIENT_FORM = "1 to 64 letters, digits, dots, underscores or hyphens"
INSTANCE = re.compile(r"[0-9a-f]{32}")
"""Tells a client from another one of the same id: drawn once for each state directory."""
RUN = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A run's id, which the server draws."""
TICKET = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""A ticket's id, which the server draws."""
