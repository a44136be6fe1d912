"""The exit codes of `fedpeft`, and which error ends with which; docs/errors.md has the table."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Self

from fedpeft.errors import (
    ConfigInvalid,
    FedpeftError,
    IdentityInvalid,
    NotFound,
    SettingsInvalid,
    SubjectInvalid,
    Unavailable,
)


class Exit(IntEnum):
    """Exit code of the process.

    Attributes:
        meaning: Words for it in each `--help`.
    """

    meaning: str

    DONE = 0, "done"
    FAILED = 1, "failed"
    USAGE = 2, "wrong usage"
    UNREACHABLE = 3, "the server cannot be reached"
    NOT_FOUND = 4, "no such run, version or name"
    NOT_COMPLETED = 5, "the run was not completed"
    INTERRUPTED = 130, "ended by Ctrl-C"

    def __new__(cls, code: int, meaning: str) -> Self:
        """Returns a code with its meaning."""
        found = int.__new__(cls, code)
        found._value_, found.meaning = code, meaning
        return found


def in_help(codes: Iterable[Exit]) -> str:
    """Returns some codes with their meanings, in a line."""
    return f"Exit codes: {'; '.join(f'{code.value} {code.meaning}' for code in sorted(codes))}."


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
