"""Errors of a failing disk or network share, which say nothing about the one image that met them."""

from __future__ import annotations

import errno
import os

from fedpeft.data.sources.file_names import shown
from fedpeft.errors import DataInvalid
from fedpeft.process.mounts import mount_of

FAILING = frozenset(
    {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EUCLEAN, errno.ENODEV, errno.ENOTCONN, errno.ETIMEDOUT}
)
"""Errors that every further file on the disk may meet as well."""


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
    mount = mount_of(path)
    return "the disk" if mount is None else f"disk {shown(mount.device)}, mounted at {shown(mount.place)},"
