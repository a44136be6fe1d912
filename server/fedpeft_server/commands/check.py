"""`fedpeft-server check`: verifies all that a stopped server has, and changes nothing of it.

Exit codes: 0 nothing is wrong; 1 something is; 2 wrong settings, an unusable folder, a bucket that
is away, or a server that runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.errors import StateInvalid
from fedpeft.process import locks
from fedpeft.process.output import say, say_json
from fedpeft_server.checks.data import check
from fedpeft_server.checks.findings import Level
from fedpeft_server.commands import place_arguments


def main(arguments: list[str]) -> int:
    """Checks a server's data; returns the exit code.

    Raises:
        FedpeftError: What kept it from it.
    """
    parser = _parser()
    given, others = parser.parse_known_args(arguments)
    settings = place_arguments.settings(given, others)
    with alone(settings.data_dir):
        report = check(settings)
    if given.json:
        say_json(report.as_json())
    else:
        for finding in report.findings:
            say(finding.line)
        for use in report.disks:
            say(use.line)
        say(report.summary)
    return 1 if report.number(Level.FAULT) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-server check",
        description="Verifies what a stopped server has, and changes nothing of it: the database, every version, state "
        "and update that it names, the chains of records and of the audit log; names what nobody knows. A line a "
        "finding, with what to do. Exit code 0: nothing is wrong; 1: something is; 2: it could not be checked.",
        epilog="Example: fedpeft-server check --data-dir /var/lib/fedpeft",
    )
    place_arguments.add(parser)
    parser.add_argument("--json", action="store_true", help="JSON in place of text")
    return parser


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a data folder, if it can be written, so that no server begins with it meanwhile.

    Raises:
        StateInvalid: If there is no such folder, or a server runs with it.
    """
    if not folder.is_dir():
        raise StateInvalid(f"--data-dir {folder}: there is no such folder")
    if not os.access(folder, os.W_OK):
        yield
        return
    with locks.directory(folder, f"--data-dir {folder}", "server", "check a backup of it"):
        yield
