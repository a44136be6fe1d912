"""The exit codes of `fedpeft`, and which error ends with which; docs/errors.md has the table."""

from __future__ import annotations

from enum import IntEnum

from fedpeft.errors import (
    ConfigInvalid,
    FedpeftError,
    IdentityInvalid,
    NotFound,
    SettingsInvalid,
    SubjectInvalid,
    Unavailable,
)

IN_HELP = (
    "Exit codes: 0 done; 1 failed; 2 wrong usage or run file; 3 server unreachable; 4 no such run, version or name; "
    "5 run not completed; 130 interrupted."
)


class Exit(IntEnum):
    """Exit code of the process."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    NOT_COMPLETED = 5
    INTERRUPTED = 130


_CODES: tuple[tuple[type[FedpeftError], Exit], ...] = (
    (ConfigInvalid, Exit.USAGE),
    (IdentityInvalid, Exit.USAGE),
    (SettingsInvalid, Exit.USAGE),
    (SubjectInvalid, Exit.USAGE),
    (Unavailable, Exit.UNREACHABLE),
    (NotFound, Exit.NOT_FOUND),
)


def code_of(error: FedpeftError) -> Exit:
    """Returns the exit code of an error."""
    return next((code for cls, code in _CODES if isinstance(error, cls)), Exit.FAILED)
