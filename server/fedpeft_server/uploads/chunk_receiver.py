"""Payloads as they arrive: chunks into the spool, one after the other, until the payload is whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fedpeft.adapters.payload import Manifest
from fedpeft.errors import ChunkInvalid, TransferStalled, UpdateTooLarge, UploadIncomplete
from fedpeft.rpc.timing import STALL_S
from fedpeft.rpc.wire import TURN_KEY
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import ended
from fedpeft_server.uploads.incoming import Context, next_message
from fedpeft_server.uploads.transfer_slots import TransferSlot


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
        booked: Callable[[int], None] = lambda size: None,
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
            wanted: Asked once the spool holds a place for it; raises if the payload is not wanted any more.
            is_kept: Asked when the upload breaks off; True if what arrived is kept, else it is removed.

        Returns:
            The writer, to be finished.

        Raises:
            TurnOver: If others wait for the slot, or a newer upload of the client took it.
            TransferStalled: If nothing comes for `STALL_S`.
            FedpeftError: If a chunk is refused.
        """
        await context.send_initial_metadata(((TURN_KEY, "1"),))
        opening = asyncio.ensure_future(self._store.file(self._store.updates.writer, key, manifest))
        try:
            writer = await ended(opening)
            wanted()
            while writer.position < manifest.payload_bytes:
                await self._write(writer, context, slot, booked)
                if slot and writer.position < manifest.payload_bytes:
                    slot.check()
        except BaseException:
            opening.add_done_callback(partial(self._break_off, is_kept))  # a thread opens it though the call has left
            raise
        return writer

    def _break_off(self, is_kept: Callable[[], bool], opening: asyncio.Future[SpoolWriter]) -> None:
        """Closes the writer of an upload that broke off, and removes what nobody will continue."""
        if not opening.cancelled() and opening.exception() is None:
            self._store.soon(self._abandon, opening.result(), is_kept())

    def _abandon(self, writer: SpoolWriter, kept: bool) -> None:
        writer.abandon()
        if not kept:
            self._store.updates.remove_partial(writer.ticket)

    async def _write(
        self, writer: SpoolWriter, context: Context, slot: TransferSlot | None, booked: Callable[[int], None]
    ) -> None:
        message = await _next_chunk(context, slot)
        if message is None:
            text = f"ended at byte {writer.position} of {writer.manifest.payload_bytes}"
            raise UploadIncomplete(
                f"the stream {text}; what arrived of an update is kept, GetUpload says where to continue",
                (("chunk", text),),
            )
        if not message.HasField("chunk"):
            text = "is missing: only the first message of the stream may be a header"
            raise ChunkInvalid(f"a chunk {text}", (("chunk", text),))
        offset, data = message.chunk.offset, message.chunk.data

        def taken(writing: asyncio.Future[None]) -> None:
            if not writing.cancelled() and writing.exception() is None:
                booked(len(data))

        writing = asyncio.ensure_future(self._store.file(writer.write, offset, data))
        writing.add_done_callback(taken)  # also where the call is gone by then: the bytes are there
        await ended(writing)


async def _next_chunk(context: Context, slot: TransferSlot | None) -> Any:
    """Returns the next message of a transfer that has its slot, None at the end of the stream.

    Raises:
        TransferStalled: If none comes for too long.
        TurnOver: As soon as another transfer of the client takes the `slot`.
    """
    try:
        async with slot.bounded(STALL_S) if slot else asyncio.timeout(STALL_S):
            return await next_message(context)
    except TimeoutError:
        raise TransferStalled(f"nothing arrived for {STALL_S:.0f} s; continue where GetUpload says") from None
