"""The way of an update: admitted, spooled as it arrives, checked, made durable, counted. One method a step."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Protocol, TypeVar

from fedpeft import figures, folding, payload
from fedpeft.errors import (
    ChunkInvalid,
    ManifestInvalid,
    MetricsInvalid,
    PayloadInvalid,
    RoundClosed,
    TicketClosed,
    TransferStalled,
    UpdateDiffers,
    UpdateTooLarge,
)
from fedpeft.mapped import releaser
from fedpeft.payload import Manifest
from fedpeft.rounds import Phase, Ticket, TicketState
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import tensor_pb2
from fedpeft.wire import TURN_KEY, manifest_from_proto
from fedpeft_server.rounds.engine import RunEngine
from fedpeft_server.rpc.interceptors import Context
from fedpeft_server.rpc.turns import Turns
from fedpeft_server.settings import STALL_S
from fedpeft_server.store.rows import UpdateRow
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.store.store import Store
from fedpeft_server.traffic import Ledger

MAX_EXAMPLES = 10**9

Message = TypeVar("Message")


class Part(Protocol):
    """A message of an upload: a header or a chunk."""

    @property
    def chunk(self) -> tensor_pb2.Chunk:
        """The chunk, if it is one."""
        ...


class Uploads:
    """Receives payloads, a limited number at once.

    Args:
        store: Where they go.
        ledger: Where their bytes are booked.
        max_bytes: Largest payload taken.
        turns: How many are received at once.
    """

    def __init__(self, store: Store, ledger: Ledger, max_bytes: int, turns: Turns) -> None:
        self._store = store
        self._ledger = ledger
        self._max_bytes = max_bytes
        self.turns = turns

    async def push(
        self,
        engine: RunEngine,
        ticket: Ticket,
        header: pb.UpdateHeader,
        messages: AsyncIterator[Part],
        context: Context,
    ) -> UpdateRow:
        """Receives one update and counts it; the answer to a repetition is the first one's."""
        received = await self.received(ticket)
        if received:
            if received.manifest.sha256 != header.manifest.sha256:
                raise UpdateDiffers(f"another update was already received for {ticket.id}")
            return received
        self._admit(engine, ticket)
        try:
            manifest = self._checked(engine, header)
            encoding = engine.run.config.codec.encoding
            booked = partial(self._ledger.payload, "up", encoding)
            await self.spool(ticket.id, ticket.client, manifest, messages, context, booked)
            update = await self._store.compute(self._describe, header, manifest)
        except (ManifestInvalid, PayloadInvalid, MetricsInvalid, UpdateTooLarge) as error:
            await engine.refuse(ticket, error)
            raise
        try:
            return await engine.receive(ticket.id, update)
        except (RoundClosed, TicketClosed):
            await self._store.compute(self._store.spool.remove, ticket.id)  # its round will not do it any more
            raise

    async def received(self, ticket: Ticket) -> UpdateRow | None:
        """Returns what was received for a ticket of any round."""
        if ticket.state is not TicketState.RECEIVED:
            return None
        return await self._store.call(self._store.db.update, ticket.id)

    async def spool(
        self,
        key: str,
        client: str,
        manifest: Manifest,
        messages: AsyncIterator[Part],
        context: Context,
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        """Waits for its turn, writes chunks as they arrive until the payload is whole, checks it, makes it durable.

        The initial metadata tell the client that its turn has come. A broken stream keeps what arrived.

        Args:
            key: The ticket, or whatever names the payload in the spool.
            client: Whose turn it is.
            manifest: What arrives; fits what is wanted.
            messages: The chunks.
            context: The call.
            arrived: Told the bytes of each chunk that was taken.
        """
        if manifest.payload_bytes > self._max_bytes:
            raise UpdateTooLarge(f"the payload has {manifest.payload_bytes} bytes; at most {self._max_bytes} are taken")
        async with self.turns.take(client):
            await context.send_initial_metadata(((TURN_KEY, "1"),))
            writer = await self._store.compute(self._store.spool.writer, key, manifest)
            try:
                while writer.position < manifest.payload_bytes:
                    size = await self._write(writer, messages)
                    if arrived:
                        arrived(size)
            except BaseException:
                writer.abandon()
                raise
            await self._store.compute(writer.finish)

    async def _write(self, writer: SpoolWriter, messages: AsyncIterator[Part]) -> int:
        message = await next_message(messages)
        if message is None:
            raise ChunkInvalid(f"the stream ended at byte {writer.position}; ask GetUpload and continue from there")
        if not message.HasField("chunk"):  # type: ignore[attr-defined]
            raise ChunkInvalid("only the first message of the stream may be a header")
        writer.write(message.chunk.offset, message.chunk.data)
        return len(message.chunk.data)

    def _admit(self, engine: RunEngine, ticket: Ticket) -> None:
        if ticket.state in (TicketState.WITHDRAWN, TicketState.REFUSED):
            raise TicketClosed(f"ticket {ticket.id} was {ticket.state}: {ticket.reason or 'no reason given'}")
        open_now = engine.active and engine.round.phase is Phase.OPEN and ticket in engine.round.tickets
        if not open_now:
            raise RoundClosed(f"the round of ticket {ticket.id} has closed; keep the update for the next round")

    def _checked(self, engine: RunEngine, header: pb.UpdateHeader) -> Manifest:
        """Returns the manifest of a header that fits the round, before anything of the payload is taken."""
        config, number = engine.run.config, engine.round.number
        manifest = manifest_from_proto(header.manifest)
        payload.check_manifest(manifest, engine.run.spec.sent(number), (config.codec.encoding,))
        if not 1 <= header.examples <= MAX_EXAMPLES:
            raise PayloadInvalid(f"the update claims {header.examples} examples; 1 to {MAX_EXAMPLES} are allowed")
        figures.check(header.metrics, figures.MAX_TRAINING)
        return manifest

    def _describe(self, header: pb.UpdateHeader, manifest: Manifest) -> UpdateRow:
        with self._store.spool.open(header.ticket) as data:
            norm = math.sqrt(folding.squared_norm(manifest, data, releaser(data)))
        return UpdateRow(header.ticket, header.examples, norm, dict(header.metrics), manifest, time.time())


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
