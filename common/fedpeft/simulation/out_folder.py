"""The folder of a simulation's results: nothing in it is replaced that another program may have made.

A simulation removes `unfinished` and replaces report.json. One that was killed leaves `unfinished` in any state: empty,
without its progress (before the first round, in buffered rounds), half removed. So its files are known by their names.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fedpeft.errors import StateInvalid
from fedpeft.simulation.progress_log import MEMORY, PROGRESS, UNFINISHED
from fedpeft.simulation.versions import KEPT

REPORT = "report.json"

_REPORTED = frozenset({"run", "rounds", "facts"})
"""Keys that the report of every simulation has; `facts` is in no other's."""


def check_folder(out: Path) -> None:
    """Checks that nothing in the folder would be lost but what a simulation left there.

    Raises:
        StateInvalid: If `unfinished` or report.json is not a simulation's; nothing is touched.
    """
    for name, foreign in ((REPORT, _foreign_report(out)), (UNFINISHED, _foreign_unfinished(out))):
        if foreign:
            raise StateInvalid(
                f"{foreign}, and a simulation would replace {name}: move it away, or name another folder"
            )


def _foreign_report(out: Path) -> str:
    """Returns why report.json is not a simulation's; empty if it is, or is not there."""
    path = out / REPORT
    if not path.exists():
        return ""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    return "" if isinstance(found, dict) and found.keys() >= _REPORTED else f"{path} is not the report of a simulation"


def _foreign_unfinished(out: Path) -> str:
    """Returns what in `unfinished` is not a simulation's; empty if there is nothing."""
    folder = out / UNFINISHED
    if not os.path.lexists(folder):
        return ""
    if folder.is_symlink() or not folder.is_dir():
        return f"{folder} is not the folder of an unfinished simulation"
    for path in sorted(folder.iterdir()):
        known = path.name == MEMORY if path.is_dir() else path.name == PROGRESS or KEPT.fullmatch(path.name)
        if not known:
            return f"{path} is not of an unfinished simulation"
    return ""
