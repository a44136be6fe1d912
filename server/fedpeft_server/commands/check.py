"""`fedpeft-server check`: verifies all that a stopped server has, and changes nothing of it.

Exit codes: 0 nothing is wrong; 1 something is; 2 wrong settings, an unusable folder, a bucket that
is away, or a server that runs.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fedpeft.errors import StateInvalid
from fedpeft.process import locks
from fedpeft.process.output import say, say_json
from fedpeft_server.checks.data import check
from fedpeft_server.checks.findings import Level
from fedpeft_server.commands import place_arguments
from fedpeft_server.settings import Settings
from fedpeft_server.store.connection import sole_use, sqlite_file


def main(arguments: list[str]) -> int:
    """Checks a server's data; returns the exit code.

    Raises:
        FedpeftError: What kept it from it.
    """
    parser = _parser()
    given, others = parser.parse_known_args(arguments)
    settings = place_arguments.settings(given, others)
    with alone(settings):
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
def alone(settings: Settings) -> Iterator[None]:
    """Holds a server's data folder and database, where they can be written, so that no server begins with them.

    Raises:
        StateInvalid: If there is no such folder, or a server runs with it, or with the database of SQLite.
    """
    folder, database = settings.data_dir, sqlite_file(settings.database_url)
    if not folder.is_dir():
        raise StateInvalid(f"--data-dir {folder}: there is no such folder")
    with ExitStack() as held:
        if os.access(folder, os.W_OK):
            held.enter_context(locks.directory(folder, f"--data-dir {folder}", "server", "check a backup of it"))
        if database is not None and os.access(os.path.dirname(os.path.realpath(database)), os.W_OK):
            held.enter_context(sole_use(settings.database_url))
        yield
