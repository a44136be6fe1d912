"""One upload into the spool: bytes in order, then the checks that make it an update."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedpeft.adapters.payload import CHUNK_BYTES, Manifest, checked_squared_norm
from fedpeft.errors import (
    ChecksumMismatch,
    ChunkInvalid,
    FedpeftError,
    OffsetOutOfRange,
    PayloadInvalid,
    TurnOver,
)
from fedpeft.process.durable import WRITEBACK_BYTES, start_writeback
from fedpeft.process.mapped_files import mapped, releaser
from fedpeft_server.store.refusals import store_refusals

if TYPE_CHECKING:
    from hashlib import _Hash


class Owner(Protocol):
    """The spool, as a writer sees it."""

    def is_current(self, writer: SpoolWriter) -> bool:
        """Returns whether the writer may write."""

    def leave(self, writer: SpoolWriter) -> None:
        """Ends the writer; what arrived is kept."""

    def publish(self, writer: SpoolWriter) -> Path | None:
        """Gives the payload its final name; None if the writer may not write any more."""

    def reject(self, writer: SpoolWriter) -> bool:
        """Removes what was written; False if the writer may not write any more."""


class SpoolWriter:
    """An upload under way. Made by `Spool.writer`; use it as a context manager, which abandons what is not finished.

    Every method may wait for the disk and belongs in a thread; what is heavy runs without the interpreter's lock.

    Args:
        owner: The spool.
        lock: Held by whoever touches the files of this ticket.
        ticket: Ticket of the upload.
        manifest: Description of the payload.
        path: The file.
        descriptor: Of that file; None if the payload is whole already.
        position: Number of bytes in it.
        digest: Of these bytes, if it is known.
    """

    def __init__(
        self,
        owner: Owner,
        lock: threading.RLock,
        ticket: str,
        manifest: Manifest,
        path: Path,
        descriptor: int | None,
        position: int,
        digest: _Hash | None,
    ) -> None:
        self.ticket = ticket
        self.manifest = manifest
        self.squared_norm: float | None = None
        """The sum of the squares of all values, once this writer has checked them."""
        self._owner = owner
        self._lock = lock
        self._path = path
        self._descriptor = descriptor
        """None if the payload was whole already, or the writer is closed."""
        self._position = position
        self._started = position
        """Up to where the disk was told to write."""
        self._digest = digest
        """Of the bytes up to `_position`; None if an earlier process wrote some of them."""
        self._whole = descriptor is None
        self._is_first = True
        """Until a chunk was written."""

    @property
    def position(self) -> int:
        """Number of bytes that are held; the next chunk begins here."""
        return self._position

    def digest_so_far(self) -> tuple[int, _Hash] | None:
        """Returns the position and the digest of the bytes up to there, if they are known."""
        return None if self._digest is None else (self._position, self._digest)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Appends a chunk; the writer's first one may begin at byte 0 instead, which discards what is held.

        Args:
            offset: Its first byte's position in the payload; must be `position`, or 0 for the writer's first chunk.
            data: 1 byte to 1 MiB.

        Raises:
            ChunkInvalid: If it is empty, too large, or ends beyond the payload.
            OffsetOutOfRange: If it begins elsewhere.
            TurnOver: If a newer upload of the ticket took over, or its files were removed with its round.
            DiskFull: If there is no room; what fitted is kept. Likewise StoreUnavailable, if the folder refuses.
        """
        view = memoryview(data).cast("B")
        if not 1 <= len(view) <= CHUNK_BYTES:
            text = f"has {len(view)} bytes; 1 to {CHUNK_BYTES} are allowed"
            raise ChunkInvalid(f"a chunk of ticket {self.ticket} {text}", (("chunk.data", text),))
        with self._lock, store_refusals(f"writing the upload of {self.ticket}"):
            self._check_current()
            anew = offset == 0 and self._is_first and not self._whole
            self._check_place(offset, 0 if anew else self._position, len(view))
            if anew:
                self._begin_anew()
            self._is_first = False
            self._append(view)

    def _begin_anew(self) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        self._position = self._started = 0
        self._digest = hashlib.sha256()

    def _check_place(self, offset: int, position: int, length: int) -> None:
        if offset != position:
            text = f"begins at byte {offset}; the upload stands at {position}"
            raise OffsetOutOfRange(f"a chunk of ticket {self.ticket} {text}", (("chunk.offset", text),))
        if offset + length > self.manifest.payload_bytes:
            text = f"ends at byte {offset + length}; the payload has {self.manifest.payload_bytes}"
            raise ChunkInvalid(f"a chunk of ticket {self.ticket} {text}", (("chunk.data", text),))

    def _append(self, view: memoryview) -> None:
        assert self._descriptor is not None, "a whole payload has no room for another chunk"
        while view:
            # On a disk that is nearly full, less than asked for is written before the error comes.
            written = os.pwrite(self._descriptor, view, self._position)
            if self._digest is not None:
                self._digest.update(view[:written])
            self._position += written
            view = view[written:]
        if self._position - self._started >= WRITEBACK_BYTES:
            start_writeback(self._descriptor, self._started, self._position - self._started)
            self._started = self._position

    def finish(self) -> Path:
        """Checks the payload and makes it durable.

        Returns:
            The file that holds it.

        Raises:
            OffsetOutOfRange: If bytes are missing; what arrived is kept.
            TurnOver: If a newer upload of the ticket took over; what arrived is kept.
            ChecksumMismatch: If the bytes do not have the manifest's digest; they are removed.
            PayloadInvalid: If a value is not finite or an encoding malformed; the bytes are removed.
            DiskFull: If the disk has no room for what it had taken; the bytes are removed.
        """
        self._check_current()
        if self._position != self.manifest.payload_bytes:
            raise OffsetOutOfRange(
                f"the upload of {self.ticket} ended at byte {self._position} of {self.manifest.payload_bytes}; "
                "continue there"
            )
        if not self._whole:
            wrong = self._fault()
            if wrong is not None:
                raise wrong if self._owner.reject(self) else self._taken_over()
        with store_refusals(f"keeping the update of {self.ticket}"):
            path = self._owner.publish(self)
        if path is None:
            raise self._taken_over()
        return path

    def abandon(self) -> None:
        """Ends the upload and keeps what arrived; does nothing after `finish`."""
        with self._lock:  # a write that a thread is in the middle of is let go first
            self._owner.leave(self)
            self._close()

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def _fault(self) -> FedpeftError | None:
        """Checks and syncs, then closes; returns what is wrong.

        Without its traceback, whose frames look into the mapped file: for as long as the error lived, the room of a
        file that was removed would stay taken.
        """
        try:
            self._check()
            self._sync()
        except FedpeftError as error:
            error.__context__ = None
            return error.with_traceback(None)
        finally:
            self._close()
        return None

    def _check(self) -> None:
        with store_refusals(f"reading the upload of {self.ticket}"):
            payload = mapped(self._path)
        digest = self._digest.digest() if self._digest is not None else hashlib.sha256(payload).digest()
        if digest != self.manifest.sha256:
            raise ChecksumMismatch(
                f"the bytes of ticket {self.ticket} have digest {digest.hex()}, "
                f"its manifest says {self.manifest.sha256.hex()}; upload it again from the start"
            )
        try:
            self.squared_norm = checked_squared_norm(self.manifest, payload, releaser(payload))
        except PayloadInvalid as error:
            raise PayloadInvalid(f"update of {self.ticket}: {error.message}", error.fields) from None

    def _sync(self) -> None:
        # After a failed sync nobody knows which bytes are on the disk: `finish` discards them all.
        assert self._descriptor is not None
        with store_refusals(f"making the update of {self.ticket} durable"):
            os.fdatasync(self._descriptor)

    def _check_current(self) -> None:
        if not self._owner.is_current(self):
            raise self._taken_over()

    def _taken_over(self) -> TurnOver:
        return TurnOver(f"a newer upload of ticket {self.ticket} took over; ask GetUpload where it stands")

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
