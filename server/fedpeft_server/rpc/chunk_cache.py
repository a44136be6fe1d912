"""Chunks on their way to clients: those of a round pull side by side, so one read serves them all."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import tensor_pb2
from fedpeft_server.store.open_file import LateFile
from fedpeft_server.store.store import Store

CHUNKS = 16
"""Chunks kept in memory."""

_Reading = asyncio.Future[pb.PullAdapterResponse]


class ChunkCache:
    """The chunks that were read last, or are being read.

    Args:
        store: On whose threads they are read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._readings: OrderedDict[tuple[bytes, int, int], _Reading] = OrderedDict()

    async def get(self, sha256: bytes, file: LateFile, offset: int, length: int) -> pb.PullAdapterResponse:
        """Returns the chunk of `length` bytes at `offset` of the payload with a digest, which `file` holds."""
        key = (sha256, offset, length)
        while True:
            reading = self._readings.get(key)
            own = reading is None
            if reading is None:
                reading = asyncio.ensure_future(self._store.file(_read, file, offset, length))
                self._readings[key] = reading
                if len(self._readings) > CHUNKS:
                    self._readings.popitem(last=False)
            try:
                return await asyncio.shield(reading)
            except (OSError, ValueError):
                # Another call's file, closed when its client left, is no reason for this one to fail.
                if self._readings.get(key) is reading:
                    del self._readings[key]
                if own:
                    raise


def _read(file: LateFile, offset: int, length: int) -> pb.PullAdapterResponse:
    return pb.PullAdapterResponse(chunk=tensor_pb2.Chunk(offset=offset, data=file.read(offset, length)))
