"""Folders of backups: where one may be made or put back, and that none is served."""

from __future__ import annotations

import os
from pathlib import Path

from fedpeft.errors import StateInvalid
from fedpeft_server.backups.manifest import NAME


def check_new(flag: str, folder: Path, apart_from: Path) -> None:
    """Checks that a folder can be made, as a copy of what another holds.

    Args:
        flag: The flag that names it, for messages.
        folder: Folder that does not exist, or is empty.
        apart_from: The other folder, which must not hold this one: whoever loses that loses both.

    Raises:
        StateInvalid: If it is in the other folder, or the folder that it is to be in is not there.
    """
    real, other = Path(os.path.realpath(folder)), Path(os.path.realpath(apart_from))
    if real == other or other in real.parents:
        raise StateInvalid(f"{flag} {folder} is in {apart_from}, and would be lost with it; name one outside")
    if not real.parent.is_dir():
        raise StateInvalid(f"{flag} {folder}: the folder {real.parent} is not there; make it, or name another")


def refuse_to_serve(folder: Path) -> None:
    """Refuses to serve a backup: its files would change, and it could not be restored any more.

    Raises:
        StateInvalid: If the folder is one.
    """
    if (folder / NAME).exists():
        raise StateInvalid(
            f"--data-dir {folder} is a backup ({NAME} is in it), which serving would spoil; put it back into a new "
            "folder with `fedpeft-server restore`, and serve that"
        )
