"""The folder of a simulation's results: nothing in it is replaced that another program may have made.

A simulation removes `unfinished` and replaces report.json. One that was killed leaves `unfinished` in any state: empty,
without its progress (before the first round, in buffered rounds), half removed. So its files are known by their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fedpeft.errors import SettingsInvalid, StateInvalid
from fedpeft.models.tasks import split_data
from fedpeft.simulation.progress_log import MEMORY, PROGRESS, UNFINISHED
from fedpeft.simulation.versions import KEPT

REPORT = "report.json"
STUDY = "study.json"
"""In the folder of a study's results, see `fedpeft.studies.files`."""

_REPORTED = frozenset({"run", "rounds", "facts"})
"""Keys that the report of every simulation has; `facts` is in no other's."""


def check_apart(out: Path, data: Iterable[object]) -> None:
    """Checks that results do not lie among data: they would be read as data, or their bytes taken for theirs.

    Args:
        out: Folder of the results.
        data: Paths of data; other values are none.

    Raises:
        SettingsInvalid: If it is a folder of data, or in one.
    """
    for each in data:
        folder = Path(split_data(str(each))[1]) if isinstance(each, Path) else None
        if folder is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            raise SettingsInvalid(f"{out} is in the data {folder}, and would be read as data: name a folder elsewhere")


def check_folder(out: Path) -> None:
    """Checks that nothing in the folder would be lost but what a simulation left there.

    Raises:
        StateInvalid: If `unfinished` or report.json is not a simulation's, or it is a study's; nothing is touched.
    """
    if (out / STUDY).exists():
        raise StateInvalid(f"{out} has the results of a study, among which a simulation's would be lost; name another")
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
