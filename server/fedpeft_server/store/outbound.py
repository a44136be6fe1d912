"""Adapter versions as they go to the clients: encoded once a version, and their chunks made once for all clients.

A float32 version is not encoded at all: the data of its file, in the spec's order, are that payload.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from fedpeft import adapter_file, payload
from fedpeft.payload import Entry, Manifest
from fedpeft.spec import AdapterSpec
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import tensor_pb2
from fedpeft_server.store.blobs import Blobs
from fedpeft_server.store.rows import RunRow, VersionRow

KEPT = 256
"""Encoded versions kept over all runs."""

CHUNKS = 16
"""Chunks kept in memory: clients of a round pull side by side, so one read serves them all."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded version: its payload lies in `path` from byte `start` on; `own` if the file is made for it."""

    manifest: Manifest
    path: Path
    start: int = 0
    own: bool = True


class Outbound:
    """The encoded versions. Nothing here needs to be durable, so the folder starts empty."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self._folder = folder
        self._blobs = blobs
        self._lock = threading.Lock()
        self._encoded: OrderedDict[tuple[str, int], Encoded] = OrderedDict()
        self._chunks: OrderedDict[tuple[bytes, int, int], pb.PullAdapterResponse] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()

    def get(self, run: RunRow, version: VersionRow, key: str) -> Encoded:
        """Returns a version in the run's `codec.down`; encodes it on first use.

        Raises:
            BlobCorrupt: If the stored version is missing or does not have its digest.
        """
        with self._lock:
            encoded = self._encoded.get((run.id, version.version))
            if encoded is None:
                encoded = self._encode(run, version, key)
                self._encoded[run.id, version.version] = encoded
                while len(self._encoded) > KEPT:
                    _remove(self._encoded.popitem(last=False)[1])
            return encoded

    def chunk(self, encoded: Encoded, descriptor: int, offset: int, length: int) -> pb.PullAdapterResponse:
        """Returns the chunk of `length` bytes at `offset` of a payload whose file is open; call it from one thread."""
        key = (encoded.manifest.sha256, offset, length)
        message = self._chunks.get(key)
        if message is None:
            data = os.pread(descriptor, length, encoded.start + offset)
            message = pb.PullAdapterResponse(chunk=tensor_pb2.Chunk(offset=offset, data=data))
            self._chunks[key] = message
            if len(self._chunks) > CHUNKS:
                self._chunks.popitem(last=False)
        return message

    def keep_from(self, run_id: str, version: int) -> None:
        """Forgets the versions of a run before `version`."""
        with self._lock:
            for key in [k for k in self._encoded if k[0] == run_id and k[1] < version]:
                _remove(self._encoded.pop(key))

    def forget(self, run_id: str) -> None:
        """Forgets all versions of a run."""
        self.keep_from(run_id, 2**62)

    def _encode(self, run: RunRow, version: VersionRow, key: str) -> Encoded:
        stored_at = self._blobs.local_path(key)
        encoding = run.config.codec.down
        with adapter_file.open_adapter(stored_at, version.sha256) as stored:
            if encoding == "float32":
                return _in_place(stored_at, run.spec)
            path = self._folder / f"{run.id}-{version.version:06}.{encoding}"
            with path.open("wb") as file:
                return Encoded(payload.write(file, stored, run.spec.shared, encoding), path)


def _in_place(path: Path, spec: AdapterSpec) -> Encoded:
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
    return Encoded(Manifest(entries, offsets[-1], digest), path, start, own=False)


def _remove(encoded: Encoded) -> None:
    if encoded.own:
        encoded.path.unlink(missing_ok=True)
