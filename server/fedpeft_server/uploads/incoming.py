"""Incoming messages: few calls receive one at a time, because gRPC takes a message whole before its size is known.

A message takes memory from the moment at which gRPC is asked for it; until then its sender is let send no more than a
flow-control window. So a call waits for a slot before it asks, and leaves the slot once the message is there: the
messages that are on their way at once are bounded, over all callers and for each. The chunks of transfers need no
slot, since `TransferSlots` bounds the transfers.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc

from fedpeft.errors import ChunkInvalid, FedpeftError, MessageInvalid, TransferStalled
from fedpeft.rpc.chunk_messages import ChunkView
from fedpeft.rpc.timing import STALL_S
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import ReceivingBound
from fedpeft_server.access.call import Call, Party

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


async def first_header(requests: AsyncIterator[Any]) -> Any:
    """Returns the header with which the stream of an upload begins.

    Raises:
        ChunkInvalid: If it begins otherwise.
    """
    first = await anext(requests, None)
    if first is None or isinstance(first, ChunkView) or not first.HasField("header"):
        raise ChunkInvalid("the first message of the stream must be a header", (("header", "is missing"),))
    return first.header


class Refused:
    """Stands for a message that is refused, so that no frame of a traceback keeps its bytes.

    Attributes:
        error: The error.
    """

    def __init__(self, error: FedpeftError) -> None:
        error.__context__ = None
        self.error = error.with_traceback(None)


class ReceiveSlots:
    """Slots for receiving a message: a few for each caller, and some for all.

    Who holds the fewest comes first, then who asked first. A slot that others wait for is held for `hold_s` at most.

    Args:
        bound: Most of them.

    Attributes:
        held: Number of slots held now.
    """

    def __init__(self, bound: ReceivingBound) -> None:
        self._bound = bound
        self.held = 0
        self._held: Counter[Party] = Counter()
        self._limits: dict[asyncio.Timeout, tuple[Party, float]] = {}  # of each slot: its holder, and since when
        # By how many slots they hold: those who wait, each in the order in which its calls asked.
        self._waiting: list[OrderedDict[Party, deque[asyncio.Future[None]]]] = [
            OrderedDict() for _ in range(bound.of_one + 1)
        ]

    def of(self, party: Party) -> int:
        """Returns the number of slots that one caller holds now."""
        return self._held[party]

    @asynccontextmanager
    async def take(self, party: Party) -> AsyncIterator[None]:
        """Holds a slot for as long as the block lasts.

        Raises:
            TimeoutError: After `STALL_S` in the block, or after `hold_s` if others wait for the slot.
            TransferStalled: If no slot comes within `STALL_S`.
        """
        await self._come(party)
        limit = asyncio.timeout(STALL_S)
        try:
            async with limit:
                self._limits[limit] = party, asyncio.get_running_loop().time()
                self._hurry()
                yield
        finally:
            self._limits.pop(limit, None)
            self._leave(party)

    async def _come(self, party: Party) -> None:
        if self._held[party] < self._bound.of_one and self.held < self._bound.at_once:
            self._hold(party, 1)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[self._held[party]].setdefault(party, deque()).append(turn)
        self._hurry()
        try:
            async with asyncio.timeout(STALL_S):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._leave(party)
            else:
                self._forget(party, turn)
            if isinstance(error, TimeoutError):
                raise TransferStalled(
                    f"the server receives {self._bound.of_one} messages of one caller at once, and {party} had others "
                    f"under way for {STALL_S:.0f} s; call again"
                ) from None
            raise

    def _leave(self, party: Party) -> None:
        self._hold(party, -1)
        while self.held < self._bound.at_once and (line := next(filter(None, self._waiting[:-1]), None)):
            first, turns = next(iter(line.items()))
            turn = turns.popleft()
            if not turns:
                del line[first]
            if not turn.cancelled():
                self._hold(first, 1)
                turn.set_result(None)

    def _hold(self, party: Party, more: int) -> None:
        """Counts a slot of a caller, and lines its calls up by that."""
        turns = self._waiting[self._held[party]].pop(party, None)
        self._held[party] += more
        self.held += more
        if turns:
            self._waiting[self._held[party]][party] = turns
        if not self._held[party]:
            del self._held[party]

    def _forget(self, party: Party, turn: asyncio.Future[None]) -> None:
        line = self._waiting[self._held[party]]
        turns = line.get(party, deque())
        if turn in turns:  # unless it was passed over already
            turns.remove(turn)
            if not turns:
                del line[party]

    def _hurry(self) -> None:
        """Has slots end in time that others wait for."""
        full = any(self._waiting[:-1])
        own = self._waiting[-1]
        if not full and not own:
            return
        for limit, (party, since) in self._limits.items():
            ends = limit.when()
            if (
                (full or party in own)
                and not limit.expired()
                and ends is not None
                and ends > since + self._bound.hold_s
            ):
                limit.reschedule(since + self._bound.hold_s)


async def next_message(context: Context) -> Any:
    """Returns the next message of a call, None at the end of its stream.

    It is read from the call, not from gRPC's iterator over it: that one stands in a reference cycle with its last
    message, so a chunk for each client stayed in memory until the garbage collector came round.

    Raises:
        FedpeftError: If it is refused.
    """
    message = await context.read()
    if isinstance(message, Refused):
        raise message.error
    return None if message is grpc.aio.EOF else message


class Incoming:
    """The messages of one call that no turn bounds: each is received in a slot.

    Args:
        slots: Those of the server.
        call: The call.
        context: The same, as gRPC has it.
    """

    def __init__(self, slots: ReceiveSlots, call: Call, context: Context) -> None:
        self._slots = slots
        self._call = call
        self._context = context

    async def only(self) -> Any:
        """Returns the message of a unary call.

        Raises:
            MessageInvalid: If there is none.
            TransferStalled: If it does not come.
            FedpeftError: If it is refused.
        """
        message, name = await self._next(), self._call.short_name
        if message is None:
            raise MessageInvalid(f"a call of {name} has one message, and this one had none", ((name, "is missing"),))
        return message

    def __aiter__(self) -> Incoming:
        """Returns itself: the messages of a stream, each of which comes once."""
        return self

    async def __anext__(self) -> Any:
        """Returns the next message; nothing of it is kept here."""
        message = await self._next()
        if message is None:
            raise StopAsyncIteration
        return message

    async def _next(self) -> Any:
        try:
            async with self._slots.take(self._call.party):
                return await next_message(self._context)
        except TimeoutError:
            hold_s = bounds.RECEIVING.hold_s
            raise TransferStalled(
                f"the message to {self._call.short_name} did not come within {STALL_S:.0f} s, or within {hold_s:g} s "
                "while others waited; call again"
            ) from None
