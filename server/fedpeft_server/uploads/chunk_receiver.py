"""Payloads as they arrive: chunks into the spool, one after the other, until the payload is whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from fedpeft.adapters.payload import Manifest
from fedpeft.errors import ChunkInvalid, TransferStalled, UpdateTooLarge, UploadIncomplete
from fedpeft.rpc.chunk_messages import ChunkView
from fedpeft.rpc.timing import STALL_S
from fedpeft.rpc.wire import TURN_KEY
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import ended, succeeded
from fedpeft_server.uploads.incoming import Context, next_message
from fedpeft_server.uploads.transfer_slots import TransferSlot

Chunk = tuple[int, bytes | memoryview]
"""Offset in the payload, and the bytes."""
Booked = Callable[[int], None]
"""Called with the size of a chunk that was written."""


class ChunkReceiver:
    """Receives payloads into the spool.

    Args:
        store: Store of the payloads.
        max_bytes: Largest payload taken.
    """

    def __init__(self, store: Store, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes

    def check_size(self, manifest: Manifest) -> None:
        """Refuses what is larger than is taken.

        Raises:
            UpdateTooLarge: If it is.
        """
        if manifest.payload_bytes > self._max_bytes:
            text = f"has {manifest.payload_bytes} bytes; at most {self._max_bytes} are taken"
            raise UpdateTooLarge(f"the payload {text}", (("header.manifest.payload_bytes", text),))

    async def receive(
        self,
        key: str,
        manifest: Manifest,
        context: Context,
        slot: TransferSlot | None = None,
        booked: Booked = lambda size: None,
        wanted: Callable[[], None] = lambda: None,
        *,
        is_kept: Callable[[], bool],
    ) -> SpoolWriter:
        """Writes chunks as they arrive until the payload is whole.

        The initial metadata tell the client that its slot has come.

        Args:
            key: Names the payload in the spool.
            manifest: Description of the payload; fits what is wanted.
            context: The call.
            slot: Asked after each chunk whether there may be another; absent if the upload need not give way.
            booked: Told the bytes of each chunk that was taken.
            wanted: Called before the first chunk, for the slot may have come late, and again once the spool holds it;
                raises if the payload is not wanted any more.
            is_kept: Asked when the upload breaks off; True if what arrived is kept, else it is removed.

        Returns:
            The writer, to be finished.

        Raises:
            TurnOver: If others wait for the slot, or a newer upload of the client took it.
            TransferStalled: If nothing comes for `STALL_S`.
            FedpeftError: If a chunk is refused.
        """
        await context.send_initial_metadata(((TURN_KEY, "1"),))
        wanted()
        first = await _next_chunk(context, slot)
        opening = self._store.begin_file(self._open, key, manifest, first)  # most updates have no second chunk
        del first
        opening.add_done_callback(lambda done: booked(done.result()[1]) if succeeded(done) else None)
        try:
            writer, _ = await ended(opening)
            wanted()
            while writer.position < manifest.payload_bytes:
                if slot:
                    slot.check()
                await self._write(writer, await _next_chunk(context, slot), booked)
        except BaseException:
            # Once it is open: a thread opens it though the call has left.
            opening.add_done_callback(partial(self._break_off, key, is_kept))
            raise
        return writer

    def _open(self, key: str, manifest: Manifest, first: Chunk | None) -> tuple[SpoolWriter, int]:
        """Returns the writer of a payload with its first chunk written, and how many bytes of that it took."""
        writer = self._store.updates.writer(key, manifest)
        try:
            return writer, _append(writer, first) if writer.position < manifest.payload_bytes else 0
        except BaseException:
            writer.abandon()
            raise

    def _break_off(
        self, key: str, is_kept: Callable[[], bool], opening: asyncio.Future[tuple[SpoolWriter, int]]
    ) -> None:
        """Closes the writer of an upload that broke off, and removes what it wrote unless that is kept."""
        self._store.soon(self._abandon, key, opening.result()[0] if succeeded(opening) else None, is_kept())

    def _abandon(self, key: str, writer: SpoolWriter | None, kept: bool) -> None:
        if writer is not None:
            writer.abandon()
        if not kept:
            self._store.updates.remove_partial(key)

    async def _write(self, writer: SpoolWriter, chunk: Chunk | None, booked: Booked) -> None:
        writing = self._store.begin_file(_append, writer, chunk)
        # Counted though the call may be gone by then: the bytes are there.
        writing.add_done_callback(lambda done: booked(done.result()) if succeeded(done) else None)
        await ended(writing)


def _append(writer: SpoolWriter, chunk: Chunk | None) -> int:
    """Writes a chunk, and returns its size; None is the end of the stream, which came too early."""
    if chunk is None:
        text = f"ended at byte {writer.position} of {writer.manifest.payload_bytes}"
        raise UploadIncomplete(
            f"the stream {text}; what arrived of an update is kept, GetUpload says where to continue",
            (("chunk", text),),
        )
    writer.write(*chunk)
    return len(chunk[1])


async def _next_chunk(context: Context, slot: TransferSlot | None) -> Chunk | None:
    """Returns the next chunk of a transfer that has its slot, None at the end of the stream.

    Raises:
        TransferStalled: If none comes for too long.
        TurnOver: As soon as another transfer of the client takes the `slot`.
        ChunkInvalid: If something else comes.
    """
    try:
        async with slot.bounded(STALL_S) if slot else asyncio.timeout(STALL_S):
            message = await next_message(context)
    except TimeoutError:
        raise TransferStalled(f"nothing arrived for {STALL_S:.0f} s; continue where GetUpload says") from None
    if message is None:
        return None
    if isinstance(message, ChunkView):
        return message.offset, message.data
    if not message.HasField("chunk"):
        text = "is missing: only the first message of the stream may be a header"
        raise ChunkInvalid(f"a chunk {text}", (("chunk", text),))
    return message.chunk.offset, message.chunk.data
