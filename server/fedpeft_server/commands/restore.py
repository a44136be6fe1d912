"""`fedpeft-server restore`: puts a backup back into a new data folder, and checks what came of it.

Exit codes: 0 done; 1 done, and something is wrong, which is named; 2 wrong settings, a damaged backup, a folder in use.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from fedpeft.formatting import counted
from fedpeft.process.output import note, say
from fedpeft_server.backups.restoring import put_back
from fedpeft_server.checks.data import check
from fedpeft_server.checks.findings import Level
from fedpeft_server.commands import place_arguments
from fedpeft_server.commands.check import alone


def main(arguments: list[str]) -> int:
    """Restores a backup; returns the exit code.

    Raises:
        FedpeftError: What kept it from it; the data folder is as it was.
    """
    given, others = _parser().parse_known_args(arguments)
    settings = place_arguments.settings(given, others)
    found = put_back(given.backup, settings.data_dir)
    made = datetime.fromtimestamp(found.made_at, UTC)
    say(f"{counted(len(found.files), 'file')} of {made:%Y-%m-%d %H:%M:%S} UTC in {settings.data_dir}")
    for place in found.elsewhere:
        note(f"the backup has nothing of {place}: restore that by its own means, then run fedpeft-server check")
    if found.elsewhere:
        return 0
    with alone(settings):
        report = check(settings)
    for finding in report.findings:
        say(finding.line)
    say(report.summary)
    return 1 if report.number(Level.FAULT) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-server restore",
        description="Puts a backup back into a new data folder, or an empty one, and checks it as fedpeft-server check "
        "does. Each file is held against its digest first; nothing is overwritten.",
        epilog="Example: fedpeft-server restore --from /backup/fedpeft-monday --data-dir /var/lib/fedpeft",
    )
    place_arguments.add(parser)
    said = "the folder that fedpeft-server backup made, or a copy of it"
    parser.add_argument("--from", metavar="DIR", dest="backup", type=Path, required=True, help=said)
    return parser
