"""The server's disks as the console shows them: in words, so that a few bytes more or less are no news."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft import formatting
from fedpeft.v1 import operator_service_pb2 as pb

ELSEWHERE = ("blobs", "updates")
"""Places that may be on disks of their own."""


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """A file system that the server writes to; sizes in words.

    Attributes:
        place: data, blobs or updates.
        size: Its size.
        free: Its free space.
        spared: Free space that is kept for the server itself.
        used: Size of what the server has stored there; empty if it is not measured yet.
        is_full: True if uploads are refused because of it.
    """

    place: str
    size: str
    free: str
    spared: str
    used: str
    is_full: bool


def disk_facts(storage: pb.GetStorageResponse) -> tuple[DiskFacts, ...]:
    """Returns the disks that a server shows."""
    stored, apart = storage.stored_bytes, {disk.place for disk in storage.disks}
    used = {place: stored[place] for place in ELSEWHERE if place in stored and place in apart}
    used["data"] = sum(stored.values()) - sum(used.values())
    return tuple(
        DiskFacts(
            disk.place,
            formatting.size(disk.size_bytes),
            formatting.size(disk.free_bytes),
            formatting.size(disk.spared_bytes),
            formatting.size(used.get(disk.place, 0)) if stored else "",
            disk.free_bytes < disk.spared_bytes,
        )
        for disk in storage.disks
    )
