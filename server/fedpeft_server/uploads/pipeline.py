"""The way of an update: admitted, spooled as it arrives, checked, made durable, counted. One method a step.

What begins once the last byte is here goes to its end, whether its call is still there or not: a disk that needs
minutes keeps nobody from the receipt, because a client that asks again joins the first attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from fedpeft.adapters.payload import Manifest, squared_norm
from fedpeft.config import RunConfig
from fedpeft.errors import (
    BeingChecked,
    BlobCorrupt,
    FedpeftError,
    InvalidArgument,
    PayloadInvalid,
    RoundClosed,
    StateInvalid,
    StoreUnavailable,
    TicketClosed,
    UpdateDiffers,
    UpdateExcluded,
)
from fedpeft.process.mapped_files import releaser
from fedpeft.rounds import acceptance
from fedpeft.rounds.state_machine import Phase
from fedpeft.rounds.tickets import Ticket, TicketState
from fedpeft.rpc.timing import HOLD_S
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_server.access.call import actor
from fedpeft_server.access.untrusted_text import MAX_EXAMPLES
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.store.rows import RunRow, UpdateRow, for_sites
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import TaskSet, ended
from fedpeft_server.timing import Timing
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.uploads.chunk_receiver import ChunkReceiver
from fedpeft_server.uploads.incoming import Context
from fedpeft_server.uploads.manifests import ManifestChecker
from fedpeft_server.uploads.transfer_slots import TransferSlots

log = structlog.get_logger()

MANY_ENTRIES = 500
"""A manifest of more tensors is checked on a thread: that takes milliseconds."""
UNDECLARED_EXAMPLES = 100_000
"""Most examples of an update whose client declared none, neither with its answer to the offer nor as it registered."""

Declared = Callable[[str, str], int]
"""Returns the examples that a client (second) declared for a run (first); 0 if it did not."""


@dataclass(frozen=True, slots=True)
class _Conclusion:
    """An upload that is whole: checked, made durable and counted by a step of its own."""

    sha256: bytes
    step: asyncio.Task[UpdateRow]


class Uploads:
    """Receives payloads, a limited number at once.

    Args:
        store: Store of the payloads.
        byte_counter: Counter of their bytes.
        max_bytes: Largest payload taken.
        limit: Most updates, and beside them most versions that are brought, that are received at once.
        declared: Answers of clients to the offers of runs.
        timing: Time for which a transfer is served while others wait.
    """

    def __init__(
        self,
        store: Store,
        byte_counter: ByteCounter,
        max_bytes: int,
        limit: int,
        declared: Declared,
        timing: Timing,
    ) -> None:
        self._declared = declared
        self._store = store
        self._byte_counter = byte_counter
        self._manifest_checker = ManifestChecker()
        self._receiver = ChunkReceiver(store, max_bytes)
        self._slots = TransferSlots(limit, timing)
        self._versions = TransferSlots(limit, timing)
        self._tasks = TaskSet()
        self._concluding: dict[str, _Conclusion] = {}

    def has(self, client: str) -> bool:
        """Returns True if a client's update is arriving."""
        return self._slots.has(client)

    def clients(self) -> list[str]:
        """Returns the clients whose updates are arriving."""
        return self._slots.clients()

    def drain(self) -> None:
        """Lets uploads under way finish, and no other begin."""
        self._slots.close()
        self._versions.close()

    async def close(self) -> None:
        """Waits until what was whole is concluded."""
        await self._tasks.wait()

    async def push(
        self,
        engine: RunEngine,
        ticket: Ticket,
        header: pb.UpdateHeader,
        context: Context,
    ) -> UpdateRow:
        """Receives one update and counts it; idempotent: a repetition has the first one's answer.

        What arrived of an update that no round will take any more is removed.

        Raises:
            TransfersBusy: If no slot came for `HOLD_S`.
            TurnOver: If others wait for the slot; what arrived is kept.
            BeingChecked: If the upload is whole and has not been concluded for `HOLD_S`.
            FedpeftError: If the update is refused.
        """
        counted = await self._repeated(ticket, header)
        if counted:
            return counted
        try:
            return await self._take_in(engine, ticket, header, context)
        except RoundClosed:
            # Another daemon, whose answer the client did not get, may have counted it since this one looked.
            counted = await self._repeated(_current(engine, ticket), header) if self._store.db.is_shared else None
            if counted:
                return counted
            raise

    async def _take_in(self, engine: RunEngine, ticket: Ticket, header: pb.UpdateHeader, context: Context) -> UpdateRow:
        """Receives an update that did not count as its call began; raises as `push`."""
        if self._store.db.is_shared and not _is_open(engine, ticket):
            await engine.refresh()  # another daemon may have let the round go on
            ticket = _current(engine, ticket)
        _admit(engine, ticket)
        manifest = await self._checked(engine.run, ticket, header)
        booked = partial(self._byte_counter.payload, "up", engine.run.config.codec.encoding)
        async with self._slots.take(ticket.client) as slot:
            counted = await self._repeated(_current(engine, ticket), header)  # it may have waited for that one
            if counted:
                return counted
            writer = await self._receiver.receive(
                ticket.id,
                manifest,
                context,
                slot,
                booked,
                lambda: _admit(engine, _current(engine, ticket)),
                is_kept=lambda: _is_open(engine, ticket) or ticket.id in self._concluding,
            )
            return await self._concluded(self._begin(engine, ticket, header, writer))

    async def _repeated(self, ticket: Ticket, header: pb.UpdateHeader) -> UpdateRow | None:
        """Returns what an earlier upload for the ticket came to; None if there was none.

        Raises:
            UpdateDiffers: If it was of other bytes, and counted.
            FedpeftError: As `_joined`.
        """
        counted = await self._joined(ticket, header)
        received = counted or await self.received(ticket)
        if received and received.manifest.sha256 != header.manifest.sha256:
            raise UpdateDiffers(f"another update was already received for {ticket.id}; that one counts")
        return received

    async def received(self, ticket: Ticket) -> UpdateRow | None:
        """Returns what was received for a ticket of any round."""
        if ticket.state is not TicketState.RECEIVED:
            return None
        return await self._store.transact(self._store.db.update, ticket.id)

    async def receive_version(self, key: str, manifest: Manifest, context: Context) -> None:
        """Receives the first version of a run, or one of a parent's server, into the spool, checked and durable.

        Such an upload cannot be continued, so it need not give way to others; its slot is none of the clients'. Nothing
        of one that fails, or whose caller leaves, is kept.

        Args:
            key: Names the payload in the spool.
            manifest: Description of the payload; fits what is wanted.
            context: The call.

        Raises:
            TransfersBusy: If no slot came for `HOLD_S`.
            FedpeftError: If the payload is refused.
        """
        self._receiver.check_size(manifest)
        async with self._versions.take(key):
            writer = await self._receiver.receive(key, manifest, context, is_kept=lambda: False)
            finishing = self._tasks.start(self._store.compute(_finish, writer))
            try:
                await ended(finishing)
            except BaseException as error:
                # After it, as it goes on though the caller leaves: a payload that became whole after its removal stays.
                finishing.add_done_callback(lambda _: self._store.soon(self._store.updates.remove_all, (key,)))
                if isinstance(error, PayloadInvalid):
                    error.within("header.manifest")
                raise

    async def _conclude(
        self, engine: RunEngine, ticket: Ticket, header: pb.UpdateHeader, writer: SpoolWriter
    ) -> UpdateRow:
        """Checks a whole upload, makes it durable and counts it."""
        try:
            async with _refusing(engine, ticket):
                update = await self._store.compute(self._make_durable, header, writer, engine.run.config)
        except (BlobCorrupt, StateInvalid, StoreUnavailable):
            _admit(engine, _current(engine, ticket))  # its files went with its round meanwhile
            raise
        try:
            return await engine.receive(update, actor())
        except (RoundClosed, TicketClosed):
            await self._store.compute(self._store.updates.remove_all, (ticket.id,))  # its round will not do it any more
            raise

    def _begin(
        self, engine: RunEngine, ticket: Ticket, header: pb.UpdateHeader, writer: SpoolWriter
    ) -> asyncio.Task[UpdateRow]:
        step = self._tasks.start(self._conclude(engine, ticket, header, writer))
        self._concluding[ticket.id] = _Conclusion(header.manifest.sha256, step)
        step.add_done_callback(partial(self._end, ticket.id))
        return step

    async def _joined(self, ticket: Ticket, header: pb.UpdateHeader) -> UpdateRow | None:
        """Returns what an earlier call's upload comes to, if one is being concluded; None if other bytes were refused.

        Raises:
            BeingChecked: If it takes longer than a call may be held.
            FedpeftError: If it was of the same bytes, and refused.
        """
        concluding = self._concluding.get(ticket.id)
        if concluding is None:
            return None
        try:
            return await self._concluded(concluding.step)
        except FedpeftError as error:
            if concluding.sha256 == header.manifest.sha256 or isinstance(error, BeingChecked):
                raise
            return None

    async def _concluded(self, step: asyncio.Task[UpdateRow]) -> UpdateRow:
        """Waits for what an upload comes to, as long as a call may be held.

        Raises:
            BeingChecked: If that takes longer.
            FedpeftError: If the update is refused.
        """
        await asyncio.wait({step}, timeout=HOLD_S)
        if not step.done():
            raise BeingChecked("the update is here and is being checked, made durable and counted; ask for its receipt")
        return step.result()

    def _end(self, ticket: str, step: asyncio.Task[UpdateRow]) -> None:
        concluding = self._concluding.get(ticket)
        if concluding and concluding.step is step:
            del self._concluding[ticket]
        error = None if step.cancelled() else step.exception()
        if error and not isinstance(error, FedpeftError):
            log.error("an upload failed with an internal error", ticket=ticket, exc_info=error)

    async def _declared_by(self, client: str, run: str) -> int:
        """Returns the most examples that a client may claim for an update."""
        answered = self._declared(run, client)
        if answered:
            return min(answered, MAX_EXAMPLES)
        row = await self._store.transact(self._store.db.client, client)
        has = pb.Capabilities.FromString(row.capabilities).examples if row else 0
        return min(has or UNDECLARED_EXAMPLES, MAX_EXAMPLES)

    async def _checked(self, run: RunRow, ticket: Ticket, header: pb.UpdateHeader) -> Manifest:
        """Returns the manifest of a header that fits the round of its ticket, before anything of the payload is taken.

        A wrong header leaves the ticket good: nothing was trained or sent in vain, and the next one may be right.
        """
        declared = await self._declared_by(ticket.client, run.id)
        try:
            if len(header.manifest.tensors) > MANY_ENTRIES:
                manifest = await self._store.file(self._manifest_checker.check, run, ticket, header.manifest)
            else:
                manifest = self._manifest_checker.check(run, ticket, header.manifest)
            acceptance.check_claims(header.examples, header.metrics, declared)
        except InvalidArgument as error:
            raise error.within("header") from None
        self._receiver.check_size(manifest)
        return manifest

    def _make_durable(self, header: pb.UpdateHeader, writer: SpoolWriter, config: RunConfig) -> UpdateRow:
        """Checks a whole upload and makes it durable; returns what is to be counted.

        Raises:
            PayloadInvalid: If it is wrong, or cannot have passed the run's transforms; its bytes are removed.
        """
        _finish(writer)
        if not self._store.spool.is_whole(header.ticket, writer.manifest.sha256):  # which is no fault of a disk
            raise StateInvalid(f"the update of ticket {header.ticket} was removed before it was counted")
        squared = writer.squared_norm
        if squared is None:  # another writer checked it
            with self._store.updates.open(header.ticket, writer.manifest.sha256) as data:
                squared = squared_norm(writer.manifest, data, releaser(data))
        norm = acceptance.norm_of(writer.manifest, squared, header.examples)
        try:
            acceptance.check_norm(norm, config)
        except PayloadInvalid:
            self._store.updates.remove_all((header.ticket,))
            raise
        now = self._store.clock.time()
        return UpdateRow(header.ticket, header.examples, norm, dict(header.metrics), writer.manifest, now)


def _finish(writer: SpoolWriter) -> None:
    with writer:
        writer.finish()


def _admit(engine: RunEngine, ticket: Ticket) -> None:
    """Checks that an update may come for a ticket.

    Raises:
        UpdateExcluded: If one came and was excluded from the fold.
        TicketClosed: If the ticket was withdrawn or refused.
        RoundClosed: If its round takes no more.
    """
    if ticket.state is TicketState.REFUSED and ticket.reason.startswith(UpdateExcluded.reason):
        raise UpdateExcluded(f"the update of ticket {ticket.id} was not folded: {ticket.reason.partition(': ')[2]}")
    ticket.check_not_closed()
    if not _is_open(engine, ticket):
        why = f": {for_sites(ticket.reason)}" if ticket.state is TicketState.LATE else ""
        raise RoundClosed(f"the round of ticket {ticket.id} has closed{why}; keep the update for the next round")


def _current(engine: RunEngine, ticket: Ticket) -> Ticket:
    """Returns a ticket as it is now; as it was if its round is over."""
    return _in_progress(engine, ticket) or ticket


def _is_open(engine: RunEngine, ticket: Ticket) -> bool:
    """Returns True if an update that comes for a ticket now counts, or its round has one and may take others."""
    found = _in_progress(engine, ticket)
    if found is None or not engine.active:
        return False
    taken = engine.round.phase is Phase.OPEN and found.state is TicketState.RECEIVED
    return taken or engine.round.is_usable(found)


def _in_progress(engine: RunEngine, ticket: Ticket) -> Ticket | None:
    """Returns a ticket as the round in progress has it; None if it is of another round."""
    found = engine.round.ticket_of(ticket.client)
    return found if found is not None and found.id == ticket.id else None


@asynccontextmanager
async def _refusing(engine: RunEngine, ticket: Ticket) -> AsyncIterator[None]:
    """Closes the ticket of an update whose payload arrived whole and is wrong."""
    try:
        yield
    except PayloadInvalid as error:
        error.within("header.manifest")
        await engine.refuse(ticket, error, actor())
        raise
