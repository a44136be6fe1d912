"""Adapter versions as they go to the clients, encoded once a version.

A float32 version is not encoded at all: the data of its file, in the spec's order, are that payload.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path

from fedpeft.adapters import adapter_file, payload
from fedpeft.adapters.payload import Entry, Manifest, Selection
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.rpc.wire import manifest_to_proto
from fedpeft.v1 import tensor_pb2
from fedpeft_server.store.blobs import integrity
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.blobs.integrity import Corruption, Integrity, Kind
from fedpeft_server.store.blobs.open_file import OpenFile
from fedpeft_server.store.blobs.room import Room
from fedpeft_server.store.refusals import store_refusals
from fedpeft_server.store.rows import RunRow, VersionRow

KEPT = 256
"""Encoded versions kept over all runs."""

OWN_BYTES = 2 * 1024**3
"""Most bytes of files that were made for them; the newest one may be larger."""

_Place = tuple[str, int]
"""Run and version."""


@dataclass(frozen=True)
class Encoded:
    """An encoded version: its payload is the file `path`; where that is None, the blob itself from byte `start` on.

    `row` is the version's.
    """

    row: VersionRow
    manifest: Manifest
    path: Path | None = None
    start: int = 0
    _selections: dict[tuple[int, ...], Selection] = field(default_factory=dict, compare=False)

    def selection(self, spec: AdapterSpec, have: int | None) -> Selection:
        """Returns what is sent to a client that holds version `have`, or none; equal selections are one object."""
        content = self.row.version if self.row.source is None else self.row.source
        needed = payload.missing(self.manifest, spec, content, have)
        if needed not in self._selections:
            self._selections[needed] = Selection.of(self.manifest, needed)
        return self._selections[needed]

    @cached_property
    def described(self) -> tensor_pb2.Manifest:
        """The manifest as it is sent; not to be changed."""
        return manifest_to_proto(self.manifest)


@dataclass
class _Use:
    """A version in use.

    Attributes:
        users: Threads that use it, or wait for it.
        forgotten: True if it is to be removed after its use.
        lock: Held by the thread that uses it.
    """

    users: int = 0
    forgotten: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class DownloadCache:
    """The encoded versions. Nothing here needs to be durable, so the folder starts empty.

    Its methods may be called from any thread. Threads wait for each other only where they need the same version, which
    one of them fetches and encodes.

    Args:
        folder: Folder of the encoded versions.
        blobs: Place of the versions.
        files: Files known to be verified, and the reports of those that are corrupt.
        room: The room that a file asks for; None if it takes what there is.
    """

    def __init__(self, folder: Path, blobs: Blobs, files: Integrity | None = None, room: Room | None = None) -> None:
        self._room = room
        self._folder = folder
        self._blobs = blobs
        self._files = files or Integrity()
        self._lock = threading.Lock()  # of what follows; never held while a version is fetched or encoded
        self._encoded: OrderedDict[_Place, Encoded] = OrderedDict()
        self._uses: dict[_Place, _Use] = {}
        self._unwanted: set[Path] = set()  # files to remove; those that could not be are tried again
        self._made = count(1)
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()

    def known(self, run_id: str, version: int) -> Encoded | None:
        """Returns a version if it is encoded; looks at no file and waits for nothing."""
        return self._encoded.get((run_id, version))

    def encoded(self, run: RunRow, version: VersionRow, key: str) -> Encoded:
        """Returns a version in the run's `codec.down`; encodes it on first use.

        Raises:
            BlobCorrupt: If the stored version is missing or does not have its digest.
            StoreUnavailable: If the place of the blobs, or the folder, refuses.
            DiskFull: If there is no room.
        """
        with self._used(run, version, key) as encoded:
            return encoded

    def open(self, run: RunRow, version: VersionRow, key: str, selection: Selection | None = None) -> OpenFile:
        """Opens the payload of what `encoded` returns, or a selection of its tensors; raises as that.

        A file that was made for it and is corrupt is made again.
        """
        with (
            self._used(run, version, key, opens=True) as encoded,
            store_refusals(f"opening version {version.version} of {run.id}"),
        ):
            if encoded.path is not None:
                return OpenFile(encoded.path, 0, selection)
            with self._blobs.verified(key, version.sha256, Kind.VERSION) as path:
                return OpenFile(path, encoded.start, selection)

    @contextmanager
    def _used(self, run: RunRow, version: VersionRow, key: str, *, opens: bool = False) -> Iterator[Encoded]:
        """Gives an encoded version, whose file stays for as long as the block lasts, and is sound if it `opens`."""
        place = (run.id, version.version)
        with self._lock:
            use = self._uses.setdefault(place, _Use())
            use.users += 1
        try:
            with use.lock:
                encoded = self._encoded.get(place)
                if encoded is None or (opens and not self._is_sound(encoded)):
                    encoded = self._encode(run, version, key)
                with self._lock:
                    self._encoded[place] = encoded
                    self._encoded.move_to_end(place)
                yield encoded
        finally:
            with self._lock:
                use.users -= 1
                if not use.users:
                    del self._uses[place]
                    self._end(place, use)

    def _is_sound(self, encoded: Encoded) -> bool:
        """Returns False if the file that was made for a version is corrupt; it is set aside until the next start."""
        if encoded.path is None:
            return True
        sha256 = encoded.manifest.sha256.hex()
        with store_refusals(f"reading {encoded.path}"):
            fault = self._files.fault(encoded.path, sha256)
            if fault:
                aside = integrity.set_aside(encoded.path)
                self._files.report(Corruption(Kind.DOWNLOAD, encoded.path.name, sha256, fault, aside))
        return not fault

    def _end(self, place: _Place, use: _Use) -> None:
        if use.forgotten:
            self._drop(place)
        self._evict()
        self._remove_unwanted()

    def keep_from(self, run_id: str, version: int) -> None:
        """Forgets the versions of a run before `version`; one in use goes after its use."""
        with self._lock:
            self._forget([p for p in (*self._encoded, *self._uses) if p[0] == run_id and p[1] < version])

    def forget_versions(self, run_id: str, versions: Iterable[int]) -> None:
        """Forgets versions of a run; one in use goes after its use."""
        places = {(run_id, version) for version in versions}
        with self._lock:
            self._forget([place for place in places if place in self._encoded or place in self._uses])

    def _forget(self, places: Iterable[_Place]) -> None:
        for place in places:
            if place in self._uses:
                self._uses[place].forgotten = True
            else:
                self._drop(place)
        self._remove_unwanted()

    def forget(self, run_id: str) -> None:
        """Forgets all versions of a run."""
        self.keep_from(run_id, 2**62)

    def clean(self) -> None:
        """Tries again to remove what could not be removed before.

        Raises:
            StoreUnavailable: If something still cannot be removed.
        """
        with self._lock:
            failures = self._remove_unwanted()
        with store_refusals(f"cleaning {self._folder}"):
            if failures:
                raise failures[0]

    def _evict(self) -> None:
        """Forgets the versions that were asked for longest ago, until what is left is within bounds."""
        own = sum(encoded.manifest.payload_bytes for encoded in self._encoded.values() if encoded.path is not None)
        for place, oldest in list(self._encoded.items())[:-1]:
            if len(self._encoded) <= KEPT and own <= OWN_BYTES:
                return
            if place not in self._uses:
                own -= oldest.manifest.payload_bytes if oldest.path is not None else 0
                self._drop(place)

    def _drop(self, place: _Place) -> None:
        encoded = self._encoded.pop(place, None)
        if encoded is not None and encoded.path is not None:
            self._unwanted.add(encoded.path)

    def _remove_unwanted(self) -> list[OSError]:
        failures = []
        for path in list(self._unwanted):
            try:
                path.unlink(missing_ok=True)
                self._unwanted.discard(path)
            except OSError as error:
                failures.append(error)
        return failures

    def _encode(self, run: RunRow, version: VersionRow, key: str) -> Encoded:
        encoding = run.config.codec.down
        with (
            self._blobs.verified(key, version.sha256, Kind.VERSION) as stored_at,
            adapter_file.open_adapter(stored_at) as stored,
        ):
            if all((tensor.section.encoding or encoding) == "float32" for tensor in run.spec.shared):
                return _in_place(stored_at, version, run.spec)
            if self._room is not None:
                with store_refusals(f"encoding version {version.version} of {run.id}"):
                    self._room.check(f"version {version.version} of {run.id} in {encoding}", version.size_bytes)
            # A name of its own: what has the version's earlier one may still be read, or refuse to be removed.
            path = self._folder / f"{run.id}-{version.version:06}.{next(self._made)}.{encoding}"
            try:
                with (
                    store_refusals(f"encoding version {version.version} of {run.id}"),
                    path.open("wb") as file,
                ):
                    return Encoded(version, payload.write(file, stored, run.spec.shared, encoding), path)
            except BaseException:
                with self._lock:
                    self._unwanted.add(path)
                raise


def _in_place(path: Path, version: VersionRow, spec: AdapterSpec) -> Encoded:
    """Describes the data of an adapter file, which were written tensor after tensor in the spec's order."""
    sizes = [4 * tensor.size for tensor in spec.shared]
    offsets = [0, *accumulate(sizes)]
    with path.open("rb") as file:
        start = adapter_file.data_start(file)
    entries = tuple(
        Entry(tensor.name, tensor.shape, "float32", offset, size)
        for tensor, offset, size in zip(spec.shared, offsets, sizes, strict=False)
    )
    return Encoded(version, Manifest(entries, offsets[-1], adapter_file.data_sha256(path)), None, start)
