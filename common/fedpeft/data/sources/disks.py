"""Errors of a failing disk or network share, which say nothing about the one image that met them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from fedpeft.data.sources.file_names import shown
from fedpeft.errors import DataInvalid

FAILING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EUCLEAN, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT}
)
"""Errors that every further file on the disk may meet as well."""

_MOUNTS = Path("/proc/self/mounts")
_ESCAPED = re.compile(r"\\([0-7]{3})")


def check(error: OSError, path: str | os.PathLike[str]) -> None:
    """Refuses to go on after an error of a failing disk; does nothing about any other error.

    Raises:
        DataInvalid: If `error` is in `FAILING`; the message names the file and the disk.
    """
    if error.errno in FAILING:
        raise DataInvalid(
            f"cannot read {shown(os.fspath(path))}: {error.strerror}; {_disk(path)} is failing or away: check it, "
            "then start again"
        ) from error


def _disk(path: str | os.PathLike[str]) -> str:
    """Returns the device and the mount point that a path is on, as far as the system says."""
    place = Path(os.path.realpath(path))
    try:
        lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return "the disk"
    mounts = [(_plain(at), _plain(device)) for device, at, *_ in map(str.split, lines)]
    on = [(at, device) for at, device in mounts if place.is_relative_to(at)]
    if not on:
        return "the disk"
    at, device = max(on, key=lambda each: len(each[0]))
    return f"disk {shown(device)}, mounted at {shown(at)},"


def _plain(word: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), word)
