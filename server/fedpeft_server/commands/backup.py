"""`fedpeft-server backup`: copies a server's data into a new folder while the server works.

Exit codes: 0 done; 1 failed, or something was missing or corrupt already, which is named; 2 wrong settings or folders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fedpeft.formatting import counted
from fedpeft.process.output import note, say
from fedpeft_server.backups.copying import back_up
from fedpeft_server.commands import place_arguments


def main(arguments: list[str]) -> int:
    """Makes a backup; returns the exit code.

    Raises:
        FedpeftError: What kept it from it.
    """
    given, others = _parser().parse_known_args(arguments)
    settings = place_arguments.settings(given, others)
    made = back_up(settings, given.to)
    say(f"{counted(len(made.files), 'file')}, {made.size_bytes:,} bytes in {given.to}")
    for place in made.elsewhere:
        note(f"not in it: {place}; copy that by its own means, a database before the backup, a bucket after it")
    for path in made.lacks:
        note(f"not in it: {path}, which is missing or corrupt already; `fedpeft-server check` says what to do")
    return 1 if made.lacks else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-server backup",
        description="Copies a server's data into a new folder while the server works: the database as it is at one "
        "moment, each version, state and update that it names, the certificates and keys, and backup.json with all "
        "digests. The folder appears once it is whole. A database of PostgreSQL and an object store are not copied.",
        epilog="Example: fedpeft-server backup --data-dir /var/lib/fedpeft --to /backup/fedpeft-monday",
    )
    place_arguments.add(parser)
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the folder to make")
    return parser
