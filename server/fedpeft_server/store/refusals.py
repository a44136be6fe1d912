"""Refusals of the server's folders and object stores, as errors that clients wait out."""

from __future__ import annotations

from contextlib import AbstractContextManager

from fedpeft.errors import StoreUnavailable
from fedpeft.process import durable


def store_refusals(what: str) -> AbstractContextManager[None]:
    """Turns errors of the file system into errors of a store.

    Args:
        what: Name of the work under way, for example `writing blob KEY`.

    Raises:
        DiskFull: If there is no room.
        StoreUnavailable: For every other refusal.
    """
    return durable.refusals(what, StoreUnavailable)
