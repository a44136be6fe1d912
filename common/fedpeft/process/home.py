"""The home folder of the user, which some have none of: containers run under ids that no user has."""

from __future__ import annotations

from pathlib import Path

NO_HOME = "this user has no home folder (HOME is not set, and the user id has no name on this machine)"


def home_folder() -> Path | None:
    """Returns the user's home folder; None if there is none."""
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the password database does not know the user's id
        return None
