"""Putting a backup back, into an empty folder: each file is held against the manifest before anything has its name."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from fedpeft.errors import StateInvalid
from fedpeft.process import durable
from fedpeft_server.backups import folders, manifest
from fedpeft_server.backups.manifest import Manifest


def put_back(backup: Path, to: Path) -> Manifest:
    """Copies a backup into a new data folder, which appears once it is whole.

    Args:
        backup: The backup, or a copy of it.
        to: The data folder; must not be there, or be empty.

    Raises:
        StateInvalid: If the backup was interrupted or is damaged, the data folder is not empty, or its place
            will not do.
        DiskFull: If there is no room.
    """
    found = manifest.read(backup)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise _taken(to)
    folders.check_new("--data-dir", to, backup)
    with durable.refusals(f"restoring {backup} to {to}"):
        try:
            with durable.folder(to) as made:
                made.chmod(0o700)
                for path, copied in sorted(found.files.items()):
                    _put(backup / path, made / path, copied.sha256)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another restore was faster
                raise _taken(to) from None
            raise
    return found


def _taken(to: Path) -> StateInvalid:
    return StateInvalid(f"--data-dir {to} is not empty, and nothing is overwritten; move it away, or name a new folder")


def _put(source: Path, target: Path, sha256: str) -> None:
    if ".." in target.parts:
        raise StateInvalid(f"{source} is outside its backup; name another one")
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        shutil.copy2(source, target)
    except FileNotFoundError:
        raise StateInvalid(f"{source} is missing in the backup; name another one") from None
    if (digest := durable.sha256(target).hex()) != sha256:
        raise StateInvalid(
            f"{source} is damaged: it has sha256 {digest}, and {sha256} is recorded; name another backup"
        )
