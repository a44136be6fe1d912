"""Updates from their first byte until nothing needs them: in the spool of this server, or in an object store as well.

Uploads arrive in the spool in any case: a chunk is appended, and an upload goes on at the last byte that came. With an
object store, a whole update lies there too before its receipt, so that it outlives the machine, and another server can
fold it:

    updates/TICKET/DIGEST    the payload with that SHA-256, as it came
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from fedpeft.adapters.payload import Manifest
from fedpeft.errors import BlobCorrupt, FedpeftError
from fedpeft.process.mapped_files import mapped
from fedpeft_server.store.blobs.blobs import CHUNK_BYTES, Blobs
from fedpeft_server.store.blobs.integrity import Kind
from fedpeft_server.store.refusals import store_refusals
from fedpeft_server.store.spool import Spool
from fedpeft_server.store.spool_writer import SpoolWriter


class UpdateStore(Protocol):
    """A place of updates, each known by its ticket. Its methods may be called from any thread, and wait for a disk.

    Each may raise DiskFull if there is no room, and StoreUnavailable if the place refuses.
    """

    def position(self, ticket: str, sha256: bytes) -> int:
        """Returns how many bytes are held here of the payload with a digest: an upload goes on there."""

    def writer(self, ticket: str, manifest: Manifest) -> SpoolWriter:
        """Returns a writer that goes on where the upload stands; what it has finished is durable.

        Raises:
            UpdateDiffers: If another payload of this ticket became whole in this process.
        """

    def open(self, ticket: str, sha256: bytes) -> AbstractContextManager[memoryview]:
        """Gives the bytes of a whole update, read-only.

        Raises:
            BlobCorrupt: If it is not there, or has another digest; what has is set aside.
        """

    def remove_all(self, tickets: Iterable[str]) -> None:
        """Removes what is held of some tickets; what cannot be removed hinders no other, and is left for `clean`."""

    def remove_partial(self, ticket: str) -> None:
        """Removes what is held of a ticket unless it is whole; its writer may write no more."""

    def clean(self) -> None:
        """Tries again to remove what could not be removed before."""


AT_ONCE_BYTES = 5 * 1024 * 1024
"""An update that is no larger is put into a bucket in one request; pieces of one take three at least."""


class BucketUpdates:
    """Updates in the spool, and in an object store as soon as they are whole.

    Args:
        spool: Spool in which they arrive; what it holds need not be fetched again.
        blobs: The object store.
    """

    def __init__(self, spool: Spool, blobs: Blobs) -> None:
        self._spool = spool
        self._blobs = blobs
        self._unwanted: set[str] = set()
        self._lock = threading.Lock()
        self.position = spool.position
        self.remove_partial = spool.remove_partial
        self.is_current = spool.is_current
        self.leave = spool.leave
        self.reject = spool.reject

    def writer(self, ticket: str, manifest: Manifest) -> SpoolWriter:
        """Returns a writer of the spool, which hands what it has finished on to the object store."""
        return self._spool.writer(ticket, manifest, owner=self)

    def publish(self, writer: SpoolWriter) -> Path | None:
        """Makes a checked payload durable in both places; None if the writer is not the newest any more."""
        path = self._spool.publish(writer)
        if path is not None:
            whole = writer.manifest.payload_bytes <= AT_ONCE_BYTES
            key = update_key(writer.ticket, writer.manifest.sha256.hex())
            self._blobs.put(key, b"".join(_pieces(path)) if whole else _pieces(path))
        return path

    @contextmanager
    def open(self, ticket: str, sha256: bytes) -> Iterator[memoryview]:
        """Gives the bytes of a whole update, from the spool if they came here; raises as `UpdateStore.open`."""
        with ExitStack() as stack:
            view = None
            if self._spool.is_whole(ticket, sha256):
                with suppress(BlobCorrupt):  # the object store has another one
                    view = stack.enter_context(self._spool.open(ticket, sha256))
            if view is not None:
                yield view
                return
        with self._blobs.verified(update_key(ticket, sha256.hex()), sha256.hex(), Kind.UPDATE) as path:
            with store_refusals(f"reading the update of {ticket}"):
                view = mapped(path)
            yield view

    def remove_all(self, tickets: Iterable[str]) -> None:
        """Removes tickets from both places; raises as `UpdateStore.remove_all`."""
        tickets = list(tickets)
        with self._lock:
            self._unwanted.update(tickets)
        try:
            self._spool.remove_all(tickets)
        finally:
            self._remove_unwanted()

    def clean(self) -> None:
        """Tries again to remove what could not be removed before."""
        try:
            self._spool.clean()
        finally:
            self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        failure: FedpeftError | None = None
        with self._lock:
            tickets, self._unwanted = self._unwanted, set()
        for ticket in tickets:
            try:
                self._blobs.delete_prefix(f"updates/{ticket}/")
            except FedpeftError as error:
                failure = error
                with self._lock:
                    self._unwanted.add(ticket)
        if failure:
            raise failure


def update_key(ticket: str, sha256: str) -> str:
    """Returns the key of an update in an object store, by its ticket and the digest of its payload, hexadecimal."""
    return f"updates/{ticket}/{sha256}"


def _pieces(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file: a folder would move the file itself."""
    with store_refusals(f"reading {path}"), path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece
