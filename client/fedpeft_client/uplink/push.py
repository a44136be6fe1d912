"""Pushes a pending update: asks where the upload stands, continues there, and says what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import grpc

from fedpeft.adapters.payload import chunks
from fedpeft.errors import (
    ChecksumMismatch,
    FedpeftError,
    InvalidArgument,
    LocalError,
    ManifestInvalid,
    OffsetOutOfRange,
    PayloadInvalid,
    RoundClosed,
    ServerUnreachable,
    TicketClosed,
    UpdateDiffers,
    UpdateExcluded,
    UploadIncomplete,
)
from fedpeft.process.logs import Log
from fedpeft.rpc import chunk_messages
from fedpeft.rpc.chunk_messages import WrittenChunk
from fedpeft.rpc.end_status import EndStatus
from fedpeft.rpc.wire import TURN_KEY
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.error_policy import FAULT, NOT_ABOUT_THE_TASK
from fedpeft_client.state.outbox import Outcome, Pending
from fedpeft_client.uplink.channel import Channel, Connection
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.uplink.ticket_watch import run_while_ticket_open
from fedpeft_client.uplink.wire_checks import check_receipt, check_standing, said
from fedpeft_client.uplink.withdrawals import Withdrawals

STARTS = 3
"""Most attempts at an upload from its first byte, where its bytes arrive damaged."""

Permit = Callable[[int], Coroutine[Any, Any, bool]]
"""Waits until so many bytes may be sent; returns True if it had to."""

_Call = grpc.aio.StreamUnaryCall[pb.PushUpdateRequest | WrittenChunk, pb.PushUpdateResponse]


async def _at_once(more_bytes: int) -> bool:
    return False


class Pusher:
    """Uploads pending updates.

    Args:
        channel: The server.
        retry: The patience with it.
        egress_log: The log of all that leaves the device.
        permit: The limit on bytes, asked for what each attempt sends.
        has_residual: False for a relay, whose sums are dropped where an update goes into the residual.
    """

    def __init__(
        self,
        channel: Channel,
        retry: Retry,
        egress_log: EgressLog,
        permit: Permit = _at_once,
        *,
        has_residual: bool = True,
    ) -> None:
        self._channel = channel
        self._retry = retry
        self._egress_log = egress_log
        self._permit = permit
        self._uncounted = "it goes into the residual" if has_residual else "the sum is dropped"
        self._dropped = "it and the residual are dropped" if has_residual else "the sum is dropped"
        self._aside = ", and its content goes into the residual" if has_residual else ""
        self._withdrawals = Withdrawals(channel, retry, egress_log)
        self._committed = 0
        """Bytes that the server held when it was last asked."""

    async def push(self, pending: Pending, log: Log) -> Outcome:
        """Uploads until the server has answered for good, and returns what that means for the residual.

        Raises:
            Unavailable: If patience with an absent server is at its end, likewise DiskFull; the update stays pending.
            LocalError: Likewise, if something fails on this side: what the server has is not known then.
            FedpeftError: If the server refuses this client rather than the update.
        """
        try:
            receipt = await self._insist(pending, log)
        except (LocalError, *NOT_ABOUT_THE_TASK):
            raise
        except ManifestInvalid as error:
            log.error(f"update was refused as invalid; {self._dropped}", cause=str(error))
            await self.give_up(pending, error, log)  # its ticket is still good, and nothing right will come for it
            return Outcome.DROPPED
        except PayloadInvalid as error:
            log.error(f"update was refused as invalid; {self._dropped}", cause=str(error))
            return Outcome.DROPPED
        except (FAULT, InvalidArgument) as error:
            log.error(
                f"the server cannot take this update; it is set aside{self._aside}",
                reason=error.reason,
                cause=str(error),
            )
            counted = await self.give_up(pending, error, log, "set aside: ") is Outcome.COUNTED
            return Outcome.COUNTED if counted else Outcome.SET_ASIDE
        except UpdateDiffers as error:
            log.warning("another update was counted for the ticket", cause=str(error))
            return Outcome.COUNTED  # that one was made from the same residual
        except FedpeftError as error:
            log.warning(
                f"update was not counted; {self._uncounted}",
                reason=error.reason,
                cause=str(error),
            )
            if not isinstance(error, RoundClosed | TicketClosed | UpdateExcluded):
                return await self.give_up(pending, error, log)
            return Outcome.NOT_COUNTED
        log.info("update received", sha256=receipt.sha256.hex())
        return Outcome.COUNTED

    async def give_up(self, pending: Pending, cause: FedpeftError, log: Log, prefix: str = "") -> Outcome:
        """Tells the round not to wait, and why.

        Returns:
            The update's outcome: an upload that this side gave up may have counted after all.
        """
        words = f"{prefix}{cause}"
        state = await self._withdrawals.withdraw(pending.ticket, words, pending.run, pending.round, log)
        return Outcome.COUNTED if state == run_pb2.TICKET_STATE_RECEIVED else Outcome.NOT_COUNTED

    async def _insist(self, pending: Pending, log: Log) -> pb.PushUpdateResponse:
        """Repeats the upload while a repetition can help."""
        backoff, starts = self._retry.backoff(), 1
        while True:
            try:
                return await self._retry.call(lambda: self._continue(pending, log))
            except (ChecksumMismatch, OffsetOutOfRange) as error:
                if starts == STARTS:
                    raise
                starts += 1
                log.warning("upload starts over", cause=str(error))
            await backoff.pause()

    async def _continue(self, pending: Pending, log: Log) -> pb.PushUpdateResponse:
        """Uploads once, from the first byte that the server does not hold.

        A balancer may give each call to another server, and each holds what came to itself: one that stands elsewhere
        than the one that was asked is sent all.
        """
        async with self._channel.own_connection() as own:
            try:
                return await self._upload(pending, own, log)
            except (OffsetOutOfRange, UploadIncomplete) as error:
                log.warning("upload starts over", cause=str(error))
                return await self._upload(pending, own, log, anew=True)

    async def _upload(
        self, pending: Pending, own: Connection, log: Log, *, anew: bool = False
    ) -> pb.PushUpdateResponse:
        """Makes one upload call, which begins where the upload stands, or at byte 0 if `anew`.

        What is left is held against the limit on bytes; after a wait the server is asked again where the upload stands.
        """
        manifest = pending.header.manifest
        waited = True
        while waited:
            standing = await self._channel.get_upload(pending.ticket, manifest.sha256, on=own)
            check_standing(standing, manifest.payload_bytes, pending.ticket)
            if standing.state != run_pb2.TICKET_STATE_ISSUED:
                return _received(standing, manifest.sha256)
            offset = 0 if anew else standing.committed_bytes
            entry = message_entries.update(pending, offset)
            waited = await self._wait(pending.ticket, entry.wire_bytes)
        if standing.committed_bytes > self._committed:
            self._retry.note_progress()
        self._committed = standing.committed_bytes
        log.info("uploading", bytes=manifest.payload_bytes, offset=offset)
        with self._egress_log.record(entry):
            return await self._stream(pending, offset, own)

    async def _wait(self, ticket: str, more_bytes: int) -> bool:
        """Waits until so many bytes may be sent, or the ticket is closed; returns True if it had to."""
        with suppress(TicketClosed):  # the server's next answer says what became of it
            return await run_while_ticket_open(self._channel, ticket, self._permit(more_bytes))
        return True

    async def _stream(self, pending: Pending, offset: int, own: Connection) -> pb.PushUpdateResponse:
        call = self._channel.push_update(own)
        end, stall_s = EndStatus(call), self._channel.timing.stall_s
        try:
            try:
                header = pb.PushUpdateRequest(header=pending.header)
                self._channel.sent(header)
                await call.write(header)
                async with asyncio.timeout(stall_s):
                    turn = TURN_KEY in dict(await call.initial_metadata())
                if turn:  # else the call has ended: refused, or received before
                    await self._send(call, pending, offset)
            except asyncio.InvalidStateError:
                pass  # the server answered before the last chunk; what it said comes from the call itself
            async with asyncio.timeout(stall_s):
                receipt = await call
            self._channel.received(receipt)
            check_receipt(receipt, pending.ticket, pending.header.manifest.sha256)
            return receipt
        except TimeoutError:
            raise ServerUnreachable(f"the upload stalled: no progress for {stall_s:.0f} seconds") from None
        except grpc.aio.AioRpcError as error:
            raise self._channel.error(await end.error()) from error
        finally:
            call.cancel()

    async def _send(self, call: _Call, pending: Pending, offset: int) -> None:
        """Sends the payload from `offset` to its end."""
        for message in _chunks(pending, offset):
            self._channel.sent(message)
            async with asyncio.timeout(self._channel.timing.stall_s):
                await call.write(message)
        async with asyncio.timeout(self._channel.timing.stall_s):
            await call.done_writing()


def _chunks(pending: Pending, offset: int) -> Iterator[WrittenChunk]:
    """Yields the messages with the payload from `offset` on."""
    with pending.payload.open("rb") as file:
        file.seek(offset)
        for begin, length in chunks(offset, pending.header.manifest.payload_bytes):
            data = file.read(length)
            yield WrittenChunk(chunk_messages.write(begin, data), len(data))


def _received(standing: pb.GetUploadResponse, sha256: bytes) -> pb.PushUpdateResponse:
    """Returns the receipt of an update of that digest, whose ticket is not open any more.

    Raises:
        FedpeftError: As its upload would, if it was not received.
    """
    if standing.state == run_pb2.TICKET_STATE_RECEIVED:
        if standing.receipt.sha256 != sha256:
            raise UpdateDiffers("the server holds another update for this ticket")
        return standing.receipt
    if standing.state == run_pb2.TICKET_STATE_LATE:
        raise RoundClosed(said(standing.reason) or "the round closed before the update came")
    if standing.state == run_pb2.TICKET_STATE_REFUSED and standing.reason.startswith(UpdateExcluded.reason):
        raise UpdateExcluded(standing.reason)  # received by an attempt whose answer was lost
    if standing.state == run_pb2.TICKET_STATE_REFUSED:  # by an attempt whose answer was lost
        raise PayloadInvalid(standing.reason or "the server refused this update as invalid; its log has the reason")
    raise TicketClosed(f"the ticket is {run_pb2.TicketState.Name(standing.state)}; it takes no update")
