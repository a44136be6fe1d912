"""Chunks on their way to clients: those of a round pull side by side, so one read, and one message, serves them all."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from functools import partial

from fedpeft.rpc import chunk_messages
from fedpeft_server.store.blobs.open_file import LateFile
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import succeeded

CHUNKS = 16
"""Chunks kept in memory."""

_Reading = asyncio.Future[bytes]
_Key = tuple[Hashable, int, int]
"""Source, offset and length."""


class ChunkCache:
    """The chunks that were read last, or are being read.

    Args:
        store: On whose threads they are read.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._readings: OrderedDict[_Key, _Reading] = OrderedDict()

    async def get(self, source: Hashable, file: LateFile, offset: int, length: int) -> bytes:
        """Returns the message with the chunk of `length` bytes at `offset` of a source, which `file` holds.

        A source is named by the digest of a payload and the selection of its tensors; the clients of a round pull few.

        Raises:
            FedpeftError, OSError or ValueError: If it cannot be read from `file`; another call's failure is not passed
                on.
        """
        key = (source, offset, length)
        reading = self._readings.get(key)
        if reading is not None:
            # Another call's file may be closed, since its client left, or have met a fault that is over by now.
            with suppress(Exception):
                return await asyncio.shield(reading)
        return await asyncio.shield(self._begin(key, file))

    def _begin(self, key: _Key, file: LateFile) -> _Reading:
        _, offset, length = key
        reading = asyncio.ensure_future(self._read(file, offset, length))
        self._readings[key] = reading
        reading.add_done_callback(partial(self._drop_failed, key))
        if len(self._readings) > CHUNKS:
            self._readings.popitem(last=False)
        return reading

    def _drop_failed(self, key: _Key, reading: _Reading) -> None:
        if not succeeded(reading) and self._readings.get(key) is reading:
            del self._readings[key]

    async def _read(self, file: LateFile, offset: int, length: int) -> bytes:
        return chunk_messages.write(offset, await self._store.read_file(file, offset, length))
