"""Updates as they arrive, on local disk: a file a ticket, checked and durable once its writer has finished.

    TICKET.DIGEST.part      what has arrived so far of the payload with that SHA-256
    TICKET.DIGEST.update    the whole payload: its length, digest and values are checked and its bytes durable
    TICKET.DIGEST.manifest  beside an update that is kept for good: the `tensor.Manifest` that describes it, serialized
    TICKET.DIGEST.update.N.corrupt   an update that was found to have another digest; nothing removes it

Names carry the digest, so that what is held needs no second file to say what it is a part of. A `.update` proves no
receipt; that is the database's to say.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedpeft import ids
from fedpeft.adapters.payload import Manifest
from fedpeft.errors import BlobCorrupt, StoreUnavailable, TicketNotFound, UpdateDiffers
from fedpeft.process.durable import make_folder, refusals, sync
from fedpeft.process.mapped_files import mapped
from fedpeft.rpc.wire import manifest_to_proto
from fedpeft_server.store.blobs import integrity
from fedpeft_server.store.blobs.integrity import Corruption, Integrity, Kind
from fedpeft_server.store.blobs.room import Room
from fedpeft_server.store.refusals import store_refusals
from fedpeft_server.store.spool_writer import Owner, SpoolWriter

if TYPE_CHECKING:
    from hashlib import _Hash

FILE = re.compile(r"(?P<ticket>" + ids.TICKET.pattern + r")\.(?P<digest>[0-9a-f]{64})\.(?P<kind>part|update)")


@dataclass(frozen=True, slots=True)
class _Held:
    """The file of a ticket.

    Attributes:
        path: The file.
        digest: Of the payload that it is, or will be when whole; hexadecimal.
        whole: True if it is the whole payload, checked.
        settled: True if it became whole in this process: its receipt may be under way, so nothing may replace it.
    """

    path: Path
    digest: str
    whole: bool
    settled: bool = False

    @property
    def size(self) -> int:
        """Its bytes on the disk; 0 where somebody has removed it."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0


LOCKS = 64
"""Locks that the tickets share, so that there is none to be made and removed with each ticket."""


class Spool:
    """The folder of updates.

    Its methods, and those of its writers, may be called from any thread; all but `is_current` wait for the disk, so
    none of them belongs on an event loop. What is done to the files of one ticket happens one after the other; a disk
    that is slow with one ticket keeps few others waiting.

    Args:
        folder: Made if it does not exist. One process uses it at a time.
        keep_manifests: True to write the manifest of an update beside it, durable before the update is.
        files: Files known to be verified, and the reports of those that are corrupt.
        room: The room that uploads ask for; None if they take what there is.

    Raises:
        StateInvalid: If the folder cannot be made or read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_manifests: bool = False,
        files: Integrity | None = None,
        room: Room | None = None,
    ) -> None:
        self._folder = folder
        self._room = room
        self._files = files or Integrity()
        self._keep_manifests = keep_manifests
        self._locks = [threading.RLock() for _ in range(LOCKS)]
        self._held: dict[str, _Held] = {}
        self._writers: dict[str, SpoolWriter] = {}
        self._unwanted: set[str] = set()  # tickets whose files could not be removed
        # Digests of what this process wrote of partial uploads, so that resuming one need not read it again.
        self._digests: dict[str, tuple[int, _Hash]] = {}
        with refusals(f"opening the spool {folder}"):
            make_folder(folder)
            self._scan()

    def _scan(self) -> None:
        for path in sorted(self._folder.iterdir()):
            name = FILE.fullmatch(path.name)
            if name is None:
                self._remove_leftover(path)
                continue
            known = self._held.get(name["ticket"])
            if known is None:
                self._held[name["ticket"]] = _Held(path, name["digest"], name["kind"] == "update")
            elif known.whole:
                path.unlink(missing_ok=True)
            else:
                known.path.unlink(missing_ok=True)
                self._held[name["ticket"]] = _Held(path, name["digest"], name["kind"] == "update")

    @staticmethod
    def _remove_leftover(path: Path) -> None:
        """Removes what describes an update that is not there any more."""
        if path.suffix == ".manifest-part" or (path.suffix == ".manifest" and not path.with_suffix(".update").exists()):
            path.unlink(missing_ok=True)

    def tickets(self) -> list[str]:
        """Returns the tickets of which anything is held."""
        return list(self._held)

    def sizes(self, tickets: Collection[str]) -> dict[str, int]:
        """Returns how many bytes are held of tickets, whatever their payload: of those named and of every partial one.

        For the start of the server, when nothing else uses the spool.
        """
        with store_refusals(f"reading the spool {self._folder}"):
            return {ticket: h.size for ticket, h in self._held.items() if not h.whole or ticket in tickets}

    def position(self, ticket: str, sha256: bytes) -> int:
        """Returns how many bytes are held of the payload with a digest; those of another payload do not count."""
        held = self._held.get(ticket)
        if held is None or held.digest != sha256.hex():
            return 0
        with store_refusals(f"reading the upload of {ticket}"):
            return held.size

    def writer(self, ticket: str, manifest: Manifest, owner: Owner | None = None) -> SpoolWriter:
        """Returns a writer that goes on where the upload stands. An older writer of the ticket may write no more.

        What is held of another payload is discarded. The manifest must have passed `payload.check_manifest`, and the
        ticket must have no receipt. `owner` takes the place of the spool towards the writer.

        Raises:
            UpdateDiffers: If another payload of this ticket became whole in this process.
            DiskFull: If there is no room for the rest of the payload.
        """
        if not ids.TICKET.fullmatch(ticket):
            raise TicketNotFound(f"there is no ticket {ticket[:80]!r}")
        with self._lock_of(ticket), store_refusals(f"opening the upload of {ticket}"):
            held = self._held.get(ticket)
            if held is not None and held.digest != manifest.sha256.hex():
                self._discard(ticket, held)
                held = None
            if held is not None and held.whole and self._is_corrupt(ticket, held):
                held = None
            if not (held and held.whole) and self._room is not None:
                there = held.size if held else 0
                self._room.check_all(f"the upload of {ticket}", max(0, manifest.payload_bytes - there))
            if held is None:
                path = self._folder / f"{ticket}.{manifest.sha256.hex()}.part"
                held = _Held(path, manifest.sha256.hex(), whole=False)
            writer = self._open(ticket, manifest, held, owner or self)
            self._unwanted.discard(ticket)
            self._held[ticket], self._writers[ticket] = held, writer
            return writer

    def _lock_of(self, ticket: str) -> threading.RLock:
        return self._locks[hash(ticket) % LOCKS]

    def _discard(self, ticket: str, held: _Held) -> None:
        if held.settled and ticket not in self._unwanted:
            raise UpdateDiffers(f"another update of ticket {ticket}, with digest {held.digest}, is already complete")
        _unlink(held.path)
        self._digests.pop(ticket, None)
        del self._held[ticket]

    def _open(self, ticket: str, manifest: Manifest, held: _Held, owner: Owner) -> SpoolWriter:
        lock = self._lock_of(ticket)
        if held.whole:
            return SpoolWriter(owner, lock, ticket, manifest, held.path, None, manifest.payload_bytes, None)
        descriptor = os.open(held.path, os.O_RDWR | os.O_CREAT, 0o600)
        position = os.fstat(descriptor).st_size
        if position > manifest.payload_bytes:
            # No writer does this: the file was damaged from outside.
            os.ftruncate(descriptor, 0)
            position = 0
        older = self._writers.get(ticket)
        known = older.digest_so_far() if older is not None else self._digests.get(ticket)
        digest = hashlib.sha256() if position == 0 else None
        if known is not None and known[0] == position:
            digest = known[1].copy()
        return SpoolWriter(owner, lock, ticket, manifest, held.path, descriptor, position, digest)

    def is_current(self, writer: SpoolWriter) -> bool:
        """Returns whether a writer is the newest of its ticket, so that it may write."""
        return self._writers.get(writer.ticket) is writer

    def leave(self, writer: SpoolWriter) -> None:
        """Ends a writer, which keeps what arrived. For `SpoolWriter.abandon`."""
        with self._lock_of(writer.ticket):
            if not self.is_current(writer):
                return
            del self._writers[writer.ticket]
            known = writer.digest_so_far()
            if known is not None and writer.ticket in self._held and not self._held[writer.ticket].whole:
                self._digests[writer.ticket] = known

    def publish(self, writer: SpoolWriter) -> Path | None:
        """Gives a checked and durable payload its final name; None if the writer is not the newest any more."""
        with self._lock_of(writer.ticket):
            held = self._held.get(writer.ticket)
            if not self.is_current(writer) or held is None:
                return None
            if self._keep_manifests:
                _write_manifest(held.path.with_suffix(".manifest"), writer.manifest)
            if not held.whole:
                whole = held.path.with_suffix(".update")
                held.path.rename(whole)
                held = _Held(whole, held.digest, whole=True)
            self._files.note(held.path, held.digest)
            self._held[writer.ticket] = _Held(held.path, held.digest, whole=True, settled=True)
            self._digests.pop(writer.ticket, None)
            del self._writers[writer.ticket]
        sync(self._folder)
        return held.path

    def reject(self, writer: SpoolWriter) -> bool:
        """Removes what a writer wrote, because it is wrong; False if the writer is not the newest any more."""
        with self._lock_of(writer.ticket), store_refusals(f"cleaning the spool {self._folder}"):
            if not self.is_current(writer):
                return False
            self._remove(writer.ticket)
            return True

    def is_whole(self, ticket: str, sha256: bytes) -> bool:
        """Returns True if the whole payload with a digest is held."""
        held = self._held.get(ticket)
        return held is not None and held.whole and held.digest == sha256.hex()

    @contextmanager
    def open(self, ticket: str, sha256: bytes) -> Iterator[memoryview]:
        """Maps the whole update of a ticket into memory, read-only.

        One that is not what was received is reported and set aside, so that it can be received again.

        Raises:
            BlobCorrupt: If it is not there, or has another digest.
            StoreUnavailable: If the folder itself is not there.
        """
        held = self._held.get(ticket)
        if held is None or not self.is_whole(ticket, sha256):
            lost = Corruption(Kind.UPDATE, f"{ticket}.{sha256.hex()}.update", sha256.hex(), integrity.MISSING)
            self._files.report(lost)
            raise BlobCorrupt(f"the update of ticket {ticket} is not in {self._folder}")
        with self._lock_of(ticket), store_refusals(f"reading the update of {ticket}"):
            if self._is_corrupt(ticket, held):
                raise BlobCorrupt(f"the update of ticket {ticket} in {self._folder} is not what was received")
            view = mapped(held.path)
        yield view

    def _is_corrupt(self, ticket: str, held: _Held) -> bool:
        """Returns True if a whole update is not what was received; it is set aside then, and held no more."""
        fault = self._files.fault(held.path, held.digest)
        if not fault:
            return False
        if not self._folder.is_dir():
            raise StoreUnavailable(f"{self._folder} is not there; mount its disk")
        aside = integrity.set_aside(held.path)
        self._files.report(Corruption(Kind.UPDATE, held.path.name, held.digest, fault, aside))
        self._writers.pop(ticket, None)
        if self._held.get(ticket) is held:
            del self._held[ticket]
        return True

    def remove_all(self, tickets: Iterable[str]) -> None:
        """Removes what is held of some tickets; their writers may write no more.

        What cannot be removed hinders no other removal, and is left for `clean`.

        Raises:
            StoreUnavailable: If something could not be removed.
        """
        self._remove_each((ticket, True) for ticket in tickets)

    def clean(self) -> None:
        """Tries again to remove what could not be removed before; raises as `remove_all`."""
        self._remove_each((ticket, False) for ticket in list(self._unwanted))

    def _remove_each(self, tickets: Iterable[tuple[str, bool]]) -> None:
        """Removes what is held of tickets: each with whether it goes though its removal has not failed before."""
        failures = []
        for ticket, surely in tickets:
            with self._lock_of(ticket):
                try:
                    if surely or ticket in self._unwanted:  # a writer may have taken it up meanwhile
                        self._remove(ticket)
                except OSError as error:
                    failures.append(error)
        with store_refusals(f"cleaning the spool {self._folder}"):
            if failures:
                raise failures[0]

    def remove_partial(self, ticket: str) -> None:
        """Removes what is held of a ticket unless it is whole; its writer may write no more."""
        with self._lock_of(ticket), store_refusals(f"cleaning the spool {self._folder}"):
            held = self._held.get(ticket)
            if held is not None and not held.whole:
                self._remove(ticket)

    def others(self, keep: Collection[str], *, whole: bool = True) -> list[str]:
        """Returns the tickets of which anything is held and that are not in `keep`; for the start of the server.

        Args:
            keep: Tickets whose uploads may still be wanted.
            whole: True for those of whole updates too; else only those of partial ones.
        """
        return [ticket for ticket, held in self._held.items() if ticket not in keep and (whole or not held.whole)]

    def _remove(self, ticket: str) -> None:
        self._writers.pop(ticket, None)
        self._digests.pop(ticket, None)
        held = self._held.get(ticket)
        if held is not None:
            self._unwanted.add(ticket)
            _unlink(held.path)
            del self._held[ticket]
        self._unwanted.discard(ticket)


def _unlink(payload: Path) -> None:
    payload.unlink(missing_ok=True)
    payload.with_suffix(".manifest").unlink(missing_ok=True)


def _write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest whole or not at all; its name is durable when the folder is synced."""
    partial = path.with_suffix(".manifest-part")
    try:
        with store_refusals(f"writing {path}"):
            partial.write_bytes(manifest_to_proto(manifest).SerializeToString(deterministic=True))
            sync(partial)
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
