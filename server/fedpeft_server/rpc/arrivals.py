"""Payloads as they arrive: chunks into the spool, one after the other, until the payload is whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Protocol, TypeVar

from fedpeft.errors import ChunkInvalid, TransferStalled, UpdateTooLarge
from fedpeft.payload import Manifest
from fedpeft.v1 import tensor_pb2
from fedpeft.wire import TURN_KEY
from fedpeft_server.rpc.interceptors import Context
from fedpeft_server.rpc.turns import Turn
from fedpeft_server.settings import STALL_S
from fedpeft_server.store.spool import Spool
from fedpeft_server.store.spool_writer import SpoolWriter

Message = TypeVar("Message")


class Part(Protocol):
    """A message of an upload: a header or a chunk."""

    @property
    def chunk(self) -> tensor_pb2.Chunk:
        """The chunk, if it is one."""
        ...


class Arrivals:
    """Takes payloads into the spool.

    Args:
        spool: Where they go.
        max_bytes: Largest payload taken.
    """

    def __init__(self, spool: Spool, max_bytes: int) -> None:
        self._spool = spool
        self._max_bytes = max_bytes

    def check_size(self, manifest: Manifest) -> None:
        """Refuses what is larger than is taken.

        Raises:
            UpdateTooLarge: If it is.
        """
        if manifest.payload_bytes > self._max_bytes:
            raise UpdateTooLarge(f"the payload has {manifest.payload_bytes} bytes; at most {self._max_bytes} are taken")

    async def take(
        self,
        key: str,
        manifest: Manifest,
        messages: AsyncIterator[Part],
        context: Context,
        turn: Turn | None = None,
        booked: Callable[[int], None] | None = None,
    ) -> SpoolWriter:
        """Writes chunks as they arrive until the payload is whole. A broken stream keeps what arrived.

        The initial metadata tell the client that its turn has come.

        Args:
            key: Names the payload in the spool.
            manifest: What arrives; fits what is wanted.
            messages: The chunks.
            context: The call.
            turn: Asked after each chunk whether there may be another; absent if the upload need not give way.
            booked: Told the bytes of each chunk that was taken.

        Returns:
            The writer, to be finished.

        Raises:
            TurnOver: If others wait for the turn.
            TransferStalled: If nothing comes for `STALL_S`.
            FedpeftError: If a chunk is refused.
        """
        await context.send_initial_metadata(((TURN_KEY, "1"),))
        writer = await self._opened(key, manifest)
        try:
            while writer.position < manifest.payload_bytes:
                size = await self._write(writer, messages)
                if booked:
                    booked(size)
                if turn and writer.position < manifest.payload_bytes:
                    turn.check()
        except BaseException:
            writer.abandon()
            raise
        return writer

    async def _opened(self, key: str, manifest: Manifest) -> SpoolWriter:
        """Opens a writer, on a thread that need not wait for the checks of other uploads."""
        opening = asyncio.ensure_future(asyncio.to_thread(self._spool.writer, key, manifest))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_abandon)  # the thread opens it all the same
            raise

    async def _write(self, writer: SpoolWriter, messages: AsyncIterator[Part]) -> int:
        message = await next_message(messages)
        if message is None:
            raise ChunkInvalid(f"the stream ended at byte {writer.position}; ask GetUpload and continue from there")
        if not message.HasField("chunk"):  # type: ignore[attr-defined]
            raise ChunkInvalid("only the first message of the stream may be a header")
        writer.write(message.chunk.offset, message.chunk.data)
        return len(message.chunk.data)


def _abandon(opening: asyncio.Future[SpoolWriter]) -> None:
    """Closes a writer that was opened for a call that had left by then."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abandon()


async def next_message(messages: AsyncIterator[Message]) -> Message | None:
    """Returns the next message of a stream, None at its end.

    Raises:
        TransferStalled: If none comes for too long.
    """
    try:
        async with asyncio.timeout(STALL_S):
            return await anext(messages, None)
    except TimeoutError:
        raise TransferStalled(f"nothing arrived for {STALL_S:.0f} s; continue where GetUpload says") from None
