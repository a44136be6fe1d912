"""Start and end of a command: Ctrl-C while it is imported, arguments that are no text, output that nobody takes."""

from __future__ import annotations

import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import pairwise
from typing import Any

from fedpeft.errors import FedpeftError, SettingsInvalid

NOBODY_READS = 128 + signal.SIGPIPE
"""Exit code of a command whose standard output is a pipe that was closed: that of a program which SIGPIPE ends."""

_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""Characters that stand in an argument for bytes that are not UTF-8."""


def begin(module: str) -> None:
    """Imports a module and runs its `main`."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(module).main
    signal.signal(signal.SIGINT, handler)
    main()


@contextmanager
def to_the_end(program: str) -> Iterator[None]:
    """Ends the process after a block that printed, if standard output did not take all of it.

    Quietly with `NOBODY_READS` if it is a pipe that was closed, as `head` does; with 1 and a sentence otherwise.

    Args:
        program: Name of the command, which begins the sentence.
    """
    output = _watched_output()
    try:
        yield
    except FedpeftError:  # which says more than that its output was lost
        _give_up(output)
        raise
    except (Exception, SystemExit):
        _end_if_lost(output, program)
        raise
    _end_if_lost(output, program)


@contextmanager
def naming_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Turns a failure to encode an argument, which is no UTF-8, into a sentence; a path need not be UTF-8.

    Raises:
        SettingsInvalid: If what could not be encoded stands in an argument.
    """
    try:
        yield
    except UnicodeEncodeError as error:
        for before, argument in pairwise(("", *arguments)):
            flag, _, value = argument.rpartition("=") if argument.startswith("-") else (before, "", argument)
            if _NOT_UTF8.search(value) and value in error.object:
                which = flag if flag.startswith("-") else f"an argument after {flag!r}"
                raise SettingsInvalid(f"{which} is not UTF-8: {value[:80]!r}") from None
        raise


def check_command(arguments: Sequence[str], commands: Collection[str]) -> None:
    """Checks that the word which stands first on a command line, if no flag does, is a command.

    Args:
        arguments: The command line without the program's name.
        commands: The words that are.

    Raises:
        SettingsInvalid: If it is none; with the command that it resembles, or all of them.
    """
    if not arguments or arguments[0].startswith("-") or arguments[0] in commands:
        return
    alike = difflib.get_close_matches(arguments[0], commands, 1)
    remedy = f"did you mean {alike[0]}?" if alike else f"the commands are {', '.join(sorted(commands))}"
    raise SettingsInvalid(f"there is no command {arguments[0][:80]!r}; {remedy}")


def note(text: str) -> None:
    """Writes a line about the work to standard error, if that takes it: the exit code does not depend on it."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


class _Output(io.FileIO):
    """Standard output that keeps why it refused what was written; a library on the way may hide it."""

    refusal: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refusal = error
            raise


def _watched_output() -> _Output | None:
    """Puts `_Output` below standard output; None if somebody in this process has put something else there."""
    old = sys.stdout
    if (
        old is None
    ):  # a closed descriptor: in its place one that only reads refuses what is written, with the same words
        raw = _Output(os.open(os.devnull, os.O_RDONLY), "w")
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), "utf-8")
        return raw
    if old is not sys.__stdout__ or not isinstance(old, io.TextIOWrapper):
        return None
    old.flush()
    raw = _Output(old.fileno(), "w", closefd=False)
    through: Any = raw if old.write_through else io.BufferedWriter(raw)  # as the interpreter makes it
    sys.stdout = io.TextIOWrapper(
        through, old.encoding, old.errors, line_buffering=old.line_buffering, write_through=old.write_through
    )
    return raw


def _end_if_lost(output: _Output | None, program: str) -> None:
    refusal = _give_up(output)
    if isinstance(refusal, BrokenPipeError):
        sys.exit(NOBODY_READS)
    if refusal is not None:
        note(f"{program}: standard output cannot be written: {refusal.strerror}")
        sys.exit(1)


def _give_up(output: _Output | None) -> OSError | None:
    """Writes what is left to be written; returns why standard output refused, which then drops what it is given."""
    if output is None:
        return None
    with suppress(OSError):  # it is in `refusal`
        sys.stdout.flush()
    if output.refusal is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output.fileno())  # the interpreter flushes again as it ends
        os.close(nowhere)
    return output.refusal
