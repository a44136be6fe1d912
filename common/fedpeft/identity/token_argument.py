"""The enrolment token on a command line: read from standard input or a file, or taken off the line at once.

Everybody on a machine can read the command lines of its processes. So a process that finds a token on its own
replaces itself before it does anything else: the same command, with `-` in the token's place and the token on its
standard input.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from fedpeft import text_files
from fedpeft.errors import SettingsInvalid
from fedpeft.identity.token import MAX_LENGTH, EnrollmentToken

_MOST_BYTES = 4 * (MAX_LENGTH + 1)
"""Of a token in the widest encoding."""

LEFT = "interrupted; run the command again at any time: the same token still works here"
"""Message to somebody who interrupts an enrolment."""
HELP = "the line that `fedpeft token create` printed; - reads it from standard input, FILE or @FILE from a file"


def take(argument: str) -> EnrollmentToken:
    """Returns the token that an argument means.

    Does not return if the token itself is on this process's command line: then the process is replaced.

    Raises:
        SettingsInvalid: If the file cannot be read.
        IdentityInvalid: If it is no token.
    """
    if argument == "-":
        return EnrollmentToken.decode(_typed())
    if argument.startswith("@"):
        return EnrollmentToken.decode(_filed(Path(argument[1:])))
    if os.path.isfile(argument):  # which no token is the name of; a token is far longer than names can be
        return EnrollmentToken.decode(_filed(Path(argument)))
    if argument in sys.orig_argv:
        _replace_process(argument)
    return EnrollmentToken.decode(argument)


def _typed() -> str:
    if sys.stdin.isatty():
        try:
            return getpass.getpass("token (it is not shown): ")
        except EOFError:  # Ctrl-D
            return ""
    return _text(sys.stdin.buffer.read(_MOST_BYTES))


def _filed(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return _text(file.read(_MOST_BYTES))
    except OSError as error:
        raise SettingsInvalid(f"the token cannot be read from {path}: {error.strerror}") from None


def _text(data: bytes) -> str:
    """Returns a token as it was written: PowerShell's `>` writes UTF-16, and some editors a byte order mark."""
    try:
        return text_files.decode(data)
    except text_files.NotText:
        return data.decode("ascii", "replace")  # it is no token, which is said better there


def _replace_process(token: str) -> None:
    """Begins this command anew with the token on standard input; a pipe holds more than a token is long."""
    reading, writing = os.pipe()
    os.write(writing, token.encode()[: MAX_LENGTH + 1])
    os.close(writing)
    os.dup2(reading, 0)
    os.close(reading)
    os.execv(sys.executable, ["-" if word == token else word for word in sys.orig_argv])
