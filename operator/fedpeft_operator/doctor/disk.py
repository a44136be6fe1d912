"""Checks that a folder can be written, durably and for a while."""

from __future__ import annotations

import errno
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedpeft.formatting import size
from fedpeft.process.addresses import check_place, folder_of
from fedpeft.process.mounts import mount_of, tree_bytes
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok, warning

GIB = 1024**3
SLOW_S = 0.05
"""A sync that takes longer than this is felt in every round."""
SYNCS = 5
REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "fuse.s3fs", "ceph", "glusterfs"})
"""File systems on which the locks of SQLite and of the folder itself cannot be relied on."""


def check_disks(setup: Setup) -> Iterator[Finding]:
    """Looks at the folders that are written to."""
    blobs = None
    try:
        blobs = folder_of(check_place(setup.blobs)) if setup.blobs else None
    except ValueError as error:
        yield fault("blobs", f"--blobs: {error}", "correct --blobs, and that of the server")
    folders = (
        ("data folder", setup.data_dir, 10 * GIB),
        ("blobs", blobs, 10 * GIB),
        ("state folder", setup.state_dir, GIB),
    )
    for name, folder, least in folders:
        if folder is not None:
            yield from _check(name, folder, least)


def _check(name: str, folder: Path, least: int) -> Iterator[Finding]:
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        took_s = sync_s(there)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free some space, or take a larger disk" if full else "give it to the user that runs FedPEFT"
        yield fault(name, f"{there} cannot be written: {error.strerror}", cure)
        return
    usage, left = shutil.disk_usage(there), os.statvfs(there)
    free, used = usage.free, size(tree_bytes(folder))
    said = f"{there}, {used} in use, {size(free)} free of {size(usage.total)}, a sync takes {1000 * took_s:.1f} ms"
    if free < GIB // 4 or (left.f_files and left.f_favail < 1000):
        yield fault(name, f"{said}; that is almost none", "free some space, or take a larger disk")
    elif free < least:
        yield warning(name, said, f"have at least {size(least)} free: updates and versions are kept there")
    else:
        yield ok(name, said)
    if not folder.exists():
        yield warning(
            name, f"{folder} is not there", "check the path; before the first start, which makes it, that is right"
        )
    if took_s > SLOW_S:
        yield warning(name, f"a sync takes {1000 * took_s:.0f} ms", "take a local disk: every update waits for one")
    if (mount := mount_of(there)) is not None and mount.type in REMOTE:
        yield warning(
            name, f"{there} is on {mount.type}", "take a local disk, or PostgreSQL and a bucket for the server"
        )


def sync_s(folder: Path) -> float:
    """Returns how long it takes to make 4 KiB durable in a folder, the median of some."""
    took = []
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".fedpeft-doctor-") as file:
        for _ in range(SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.monotonic()
            os.fsync(file.fileno())
            took.append(time.monotonic() - began)
    return statistics.median(took)
