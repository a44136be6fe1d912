"""The adapter version that is held of a run: one payload, named by its digest, and the manifest that points to it.

adapter.json              {"version", "manifest"}; replaced in one rename, which is what makes a payload held
adapter-SHA256.payload    the bytes
adapter-VERSION.part      the first bytes of a version that is being pulled; continued after an interruption
adapter-VERSION-from-HELD.part  likewise, of the tensors that changed since version HELD, which is held
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf import json_format

from fedpeft.adapters.payload import CHUNK_BYTES, Manifest, Selection
from fedpeft.errors import ChecksumMismatch, FedpeftError
from fedpeft.process import durable, logs
from fedpeft.rpc import wire
from fedpeft.v1 import tensor_pb2

_log = logs.logger()


@dataclass(frozen=True, slots=True)
class CachedAdapter:
    """An adapter version on disk whose digest was checked."""

    version: int
    manifest: Manifest
    payload: Path


class AdapterCache:
    """The last adapter version of one run, in the run's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index = folder / "adapter.json"

    def held(self) -> CachedAdapter | None:
        """Returns the version held, or None if there is none or its bytes are damaged (then it is pulled again)."""
        try:
            record = json.loads(self._index.read_bytes())
            message = json_format.ParseDict(record["manifest"], tensor_pb2.Manifest())
            manifest = wire.manifest_from_proto(message)
            held = CachedAdapter(int(record["version"]), manifest, self._payload(manifest))
            if durable.sha256(held.payload) == manifest.sha256:
                return held
            cause = f"{held.payload.name} does not have the digest of its manifest"
        except FileNotFoundError as error:
            if error.filename == str(self._index):
                return None
            cause = str(error)
        except (OSError, KeyError, TypeError, ValueError, json_format.Error, FedpeftError) as error:
            cause = f"{type(error).__name__}: {error}"
        _log.warning("the adapter version on disk is damaged; it is pulled again", file=str(self._index), cause=cause)
        return None

    def part(self, version: int, since: int | None = None) -> Path:
        """Returns the file that collects the bytes of a version, or of what changed in it since another one.

        Parts of other versions are removed.
        """
        mine = self._parts(version)
        for other in self._folder.glob("adapter-*.part"):
            if other not in mine:
                other.unlink()
        return self._folder / (f"adapter-{version}.part" if since is None else f"adapter-{version}-from-{since}.part")

    def discard(self, version: int) -> None:
        """Removes what was collected of a version."""
        for part in self._parts(version):
            part.unlink(missing_ok=True)

    def _parts(self, version: int) -> list[Path]:
        return list(self._folder.glob(f"adapter-{version}[-.]*part"))

    def complete(self, version: int, manifest: Manifest, selection: Selection, held: CachedAdapter) -> None:
        """Collects the bytes of a version from those of the tensors that changed and, for the others, what is held.

        Raises:
            ChecksumMismatch: If a tensor is held in another form than the version has it.
        """
        known, chosen = {entry.name: entry for entry in held.manifest.entries}, set(selection.tensors)
        path = self._folder / f"adapter-{version}-whole.part"
        with (
            self.part(version, held.version).open("rb") as changed,
            held.payload.open("rb") as old,
            path.open("wb") as whole,
        ):
            for i, entry in enumerate(manifest.entries):
                if i in chosen:
                    _copy(changed, whole, entry.length)
                    continue
                mine = known.get(entry.name)
                if mine is None or (mine.encoding, mine.length) != (entry.encoding, entry.length):
                    raise ChecksumMismatch(f"version {held.version}, which is held, has no such tensor {entry.name}")
                old.seek(mine.offset)
                _copy(old, whole, entry.length)
        path.replace(self.part(version))

    def commit(self, version: int, manifest: Manifest) -> CachedAdapter:
        """Makes the collected bytes the version held.

        Raises:
            ChecksumMismatch: If they do not have the manifest's digest; they are removed, the pull must start over.
        """
        part = self.part(version)
        part.touch()
        if durable.sha256(part) != manifest.sha256:
            self.discard(version)
            raise ChecksumMismatch(f"adapter version {version} did not arrive as it was sent")
        durable.sync(part)
        durable.move(part, self._payload(manifest))
        self.discard(version)
        return self.relabel(version, manifest)

    def relabel(self, version: int, manifest: Manifest) -> CachedAdapter:
        """Says that the payload of `manifest`, which is on disk, is adapter version `version`."""
        message = json_format.MessageToDict(wire.manifest_to_proto(manifest))
        durable.write(self._index, json.dumps({"version": version, "manifest": message}).encode())
        held = CachedAdapter(version, manifest, self._payload(manifest))
        for other in self._folder.glob("adapter-*.payload"):
            if other != held.payload:
                other.unlink()
        return held

    def _payload(self, manifest: Manifest) -> Path:
        return self._folder / f"adapter-{manifest.sha256.hex()}.payload"


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    """Copies so many bytes; fewer where the source ends, which the digest of the whole shows."""
    while length > 0 and (data := source.read(min(length, CHUNK_BYTES))):
        target.write(data)
        length -= len(data)
