"""Adapter versions as they go to the clients, encoded once a version.

A float32 version is not encoded at all: the data of its file, in the spec's order, are that payload.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

from fedpeft import adapter_file, payload
from fedpeft.payload import Entry, Manifest
from fedpeft.spec import AdapterSpec
from fedpeft.v1 import tensor_pb2
from fedpeft.wire import manifest_to_proto
from fedpeft_server.store.blobs import Blobs
from fedpeft_server.store.open_file import OpenFile
from fedpeft_server.store.rows import RunRow, VersionRow

KEPT = 256
"""Encoded versions kept over all runs."""

OWN_BYTES = 2 * 1024**3
"""Most bytes of files that were made for them; the newest one may be larger."""


@dataclass(frozen=True)
class Encoded:
    """An encoded version: its payload is the file `path`; where that is None, the blob itself from byte `start` on.

    `row` is the version's.
    """

    row: VersionRow
    manifest: Manifest
    path: Path | None = None
    start: int = 0

    @cached_property
    def described(self) -> tensor_pb2.Manifest:
        """The manifest as it is sent; not to be changed."""
        return manifest_to_proto(self.manifest)


class Outbound:
    """The encoded versions. Nothing here needs to be durable, so the folder starts empty."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self._folder = folder
        self._blobs = blobs
        self._lock = threading.Lock()
        self._encoded: OrderedDict[tuple[str, int], Encoded] = OrderedDict()
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
        """
        with self._lock:
            return self._get(run, version, key)

    def open(self, run: RunRow, version: VersionRow, key: str) -> OpenFile:
        """Opens the payload of what `encoded` returns; raises as that."""
        with self._lock:
            encoded = self._get(run, version, key)
            if encoded.path is not None:
                return OpenFile(encoded.path)
            with self._blobs.local(key) as path:
                return OpenFile(path, encoded.start)

    def _get(self, run: RunRow, version: VersionRow, key: str) -> Encoded:
        encoded = self._encoded.get((run.id, version.version))
        if encoded is None:
            encoded = self._encode(run, version, key)
            self._encoded[run.id, version.version] = encoded
            self._evict()
        self._encoded.move_to_end((run.id, version.version))
        return encoded

    def keep_from(self, run_id: str, version: int) -> None:
        """Forgets the versions of a run before `version`."""
        with self._lock:
            for key in [k for k in self._encoded if k[0] == run_id and k[1] < version]:
                _remove(self._encoded.pop(key))

    def forget(self, run_id: str) -> None:
        """Forgets all versions of a run."""
        self.keep_from(run_id, 2**62)

    def _evict(self) -> None:
        """Forgets the versions that were asked for longest ago, until what is left is within bounds."""
        own = sum(encoded.manifest.payload_bytes for encoded in self._encoded.values() if encoded.path is not None)
        while len(self._encoded) > KEPT or (own > OWN_BYTES and len(self._encoded) > 1):
            _, oldest = self._encoded.popitem(last=False)
            own -= oldest.manifest.payload_bytes if oldest.path is not None else 0
            _remove(oldest)

    def _encode(self, run: RunRow, version: VersionRow, key: str) -> Encoded:
        encoding = run.config.codec.down
        with (
            self._blobs.local(key) as stored_at,
            adapter_file.open_adapter(stored_at, version.sha256) as stored,
        ):
            if encoding == "float32":
                return _in_place(stored_at, version, run.spec)
            path = self._folder / f"{run.id}-{version.version:06}.{encoding}"
            try:
                with path.open("wb") as file:
                    return Encoded(version, payload.write(file, stored, run.spec.shared, encoding), path)
            except BaseException:
                path.unlink(missing_ok=True)
                raise


def _in_place(path: Path, version: VersionRow, spec: AdapterSpec) -> Encoded:
    """Describes the data of an adapter file, which were written tensor after tensor in the spec's order."""
    sizes = [4 * tensor.size for tensor in spec.shared]
    offsets = [0, *accumulate(sizes)]
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        digest = hashlib.file_digest(file, "sha256").digest()
    entries = tuple(
        Entry(tensor.name, tensor.shape, "float32", offset, size)
        for tensor, offset, size in zip(spec.shared, offsets, sizes, strict=False)
    )
    return Encoded(version, Manifest(entries, offsets[-1], digest), None, start)


def _remove(encoded: Encoded) -> None:
    if encoded.path is not None:
        encoded.path.unlink(missing_ok=True)
