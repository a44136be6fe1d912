"""Manifests of updates: those of one round are alike but for their digests, so one that was right is cached."""

from __future__ import annotations

import threading
from dataclasses import replace

from fedpeft.adapters.payload import Manifest
from fedpeft.errors import ManifestInvalid
from fedpeft.rounds import acceptance
from fedpeft.rounds.tickets import Ticket
from fedpeft.rpc.wire import manifest_from_proto
from fedpeft.v1 import tensor_pb2
from fedpeft_server.store.rows import RunRow

MOST_CACHED = 64
"""Rounds whose manifest is cached; one has tens of kilobytes."""


class ManifestChecker:
    """Checks manifests, with a cache: protobuf compares two of them many times faster than one is checked.

    Its method may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, int], tuple[tensor_pb2.Manifest, Manifest]] = {}

    def check(self, run: RunRow, ticket: Ticket, message: tensor_pb2.Manifest) -> Manifest:
        """Returns the manifest of a message, which describes an update for a ticket.

        Raises:
            ManifestInvalid: If it does not, below `manifest`.
        """
        key = run.id, ticket.issued_in
        tensors = tensor_pb2.Manifest()
        tensors.CopyFrom(message)
        tensors.ClearField("sha256")
        cached = self._cache.get(key)
        if cached is not None and cached[0] == tensors and len(message.sha256) == len(cached[1].sha256):
            return replace(cached[1], sha256=message.sha256)
        try:
            manifest = manifest_from_proto(message)
        except ManifestInvalid as error:
            raise error.within("manifest") from None
        acceptance.check_manifest(ticket, manifest, run.config, run.spec)
        with self._lock:
            self._cache[key] = tensors, manifest
            if len(self._cache) > MOST_CACHED:
                del self._cache[next(iter(self._cache))]
        return manifest
