"""gRPC without a network: clients' calls reach the server's real handlers through the gate, late, in parts, or never.

A call is two ordered streams of bytes and a status. What happens to it on its way is drawn: it is refused before it
arrives, breaks off after some messages, loses its answer, or arrives twice. A broken call is UNAVAILABLE to its caller,
and cancelled for the server's handler, as gRPC has it; where a line is cut nothing passes for a while.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from .loop import LIFE, SimulatedLoop

if TYPE_CHECKING:
    from .wire_server import ServedCall, SimulatedServer

Code = grpc.StatusCode
OUTSIDE = contextvars.Context()
"""The context of what is on its way: it arrives though its sender has died meanwhile."""


@dataclass(frozen=True)
class Quality:
    """Chances of what happens to a call, each from 0 to 1, and the longest time that a message takes, in seconds."""

    refused: float = 0.0
    broken: float = 0.0
    answer_lost: float = 0.0
    repeated: float = 0.0
    longest_s: float = 0.05


@dataclass
class Wire:
    """Everything between the machines.

    Attributes:
        loop: The world's loop.
        drawn: Its randomness.
        quality: Of every line.
        servers: Servers by port.
        cut: Names of machines that nothing comes from or gets to.
        lost: Calls to which something happened, by what.
    """

    loop: SimulatedLoop
    drawn: random.Random
    quality: Quality = Quality()
    servers: dict[int, SimulatedServer] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    lost: dict[str, int] = field(default_factory=dict)
    under_way: dict[Call, None] = field(default_factory=dict)

    def later(self, due: float, callback: Callable[..., object], *args: Any) -> None:
        """Has something arrive."""
        self.loop.call_at(due, callback, *args, context=OUTSIDE)

    def soon(self) -> float:
        """Draws when what is sent now arrives."""
        return self.loop.now + self.drawn.uniform(0.0, self.quality.longest_s)

    def count(self, what: str) -> None:
        """Counts what happened to a call."""
        self.lost[what] = self.lost.get(what, 0) + 1

    def break_all(self, machine: str) -> None:
        """Breaks every call to or from a machine."""
        for call in [c for c in self.under_way if machine in (c.caller, c.served_by)]:
            call.broken("the connection was lost")

    def channel(self, port: int, *, good: bool = False) -> SimulatedChannel:
        """Opens a channel for who asks; nothing happens to calls on a good one."""
        life = LIFE.get()
        return SimulatedChannel(self, port, life.name if life else "operator", good=good)


class Line:
    """One direction of a call: messages arrive in the order in which they were sent."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._free = 0.0
        self._there: deque[Any] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self.ended = False

    def send(self, message: Any) -> float:
        """Has a message arrive; returns when."""
        wire = self._wire
        due = self._free = max(self._free + 1e-6, wire.soon())
        wire.later(due, self._arrive, message)
        return due

    def end(self) -> None:
        """Ends the line at once for who reads: nothing that is not there arrives any more."""
        self.ended = True
        self._wake()

    def _arrive(self, message: Any) -> None:
        if not self.ended:
            self._there.append(message)
            self._wake()

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self) -> Any:
        """Returns the next message; `grpc.aio.EOF` once the line has ended."""
        while not self._there:
            if self.ended:
                return grpc.aio.EOF
            self._waiting = self._wire.loop.create_future()
            await self._waiting
        return self._there.popleft()


_HALF_CLOSED = object()


class Call:
    """A call as its caller has it: of any of gRPC's four kinds."""

    def __init__(
        self, channel: SimulatedChannel, path: str, pack: Any, unpack: Any, metadata: Any, timeout: Any
    ) -> None:
        self._wire = wire = channel.wire
        self.caller, self.served_by = channel.caller, ""
        self._channel, self._path, self._pack, self._unpack = channel, path, pack, unpack
        self._metadata = tuple(metadata or ())
        self._up, self._down = Line(wire), Line(wire)
        self._sent: list[bytes] = []
        self._arrived = 0
        self._served: ServedCall | None = None
        self._end: asyncio.Future[None] = wire.loop.create_future()
        self._first: asyncio.Future[tuple[Any, ...]] = wire.loop.create_future()
        self._status: tuple[Code, str, tuple[Any, ...]] = (Code.UNKNOWN, "", ())
        self._done: list[Callable[[Any], object]] = []
        self.writing: asyncio.Task[None] | None = None
        self._fate = channel.fate()
        wire.under_way[self] = None
        wire.later(wire.soon(), self._begin)
        if timeout is not None:
            wire.later(wire.loop.now + timeout, self._finish, Code.DEADLINE_EXCEEDED, "deadline exceeded", ())

    # What the world does.

    def _begin(self) -> None:
        wire, server = self._wire, self._wire.servers.get(self._channel.port)
        if self.done():
            return
        if self._fate == "refused" or self._is_cut(server):
            self.broken("connection refused")
        elif server is None or server.life.is_over:
            self.broken("nobody listens")
        else:
            self.served_by = server.life.name
            self._served = server.begin(self, self._path, self._metadata, self._up)
            if self._fate == "repeated":
                wire.later(wire.loop.now + wire.drawn.uniform(0.0, 3.0), self._repeat)
            if self._fate == "broken":
                wire.later(wire.loop.now + wire.drawn.uniform(0.0, 6 * wire.quality.longest_s), self.broken, "lost")

    def _is_cut(self, server: SimulatedServer | None) -> bool:
        cut = self._wire.cut
        return self.caller in cut or (server is not None and server.life.name in cut)

    def _repeat(self) -> None:
        """Sends all that was sent once more, as a call of its own; nobody hears what comes of it."""
        server = self._wire.servers.get(self._channel.port)
        if server is not None and not server.life.is_over and not self._is_cut(server):
            line = Line(self._wire)
            server.begin(None, self._path, self._metadata, line)
            for data in self._sent:
                line.send(data)
            line.send(_HALF_CLOSED)

    def broken(self, why: str) -> None:
        """Ends the call on both sides, as a connection that breaks."""
        if self._served is not None:
            self._served.left()
        self._finish(Code.UNAVAILABLE, why, ())

    def answered(self, status: tuple[Code, str, tuple[Any, ...]]) -> None:
        """Takes the status that the server's handler ended with, after all that it sent."""
        if self._fate == "answer lost":
            self.broken("the connection was lost before the answer")
        else:
            self._finish(*status)

    def began(self, metadata: tuple[Any, ...]) -> None:
        """Takes the server's initial metadata."""
        if not self._first.done():
            self._first.set_result(metadata)

    def _finish(self, code: Code, details: str, trailing: tuple[Any, ...]) -> None:
        if self.done():
            return
        self._status = code, details, trailing
        if code is not Code.OK and self._served is not None:
            self._served.left()
        self._wire.under_way.pop(self, None)
        self._end.set_result(None)
        self.began(())
        self._down.end()
        for callback in self._done:
            callback(self)

    # What the caller does.

    def done(self) -> bool:
        """Returns True once there is a status."""
        return self._end.done()

    def cancel(self) -> bool:
        """Ends the call; the server hears of it a moment later."""
        if self.done():
            return False
        served = self._served
        self._served = None
        if served is not None:
            self._wire.later(self._wire.soon(), served.left)
        self._finish(Code.CANCELLED, "cancelled by the caller", ())
        return True

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Has something called at the end; it is code of the caller's."""
        context = contextvars.copy_context()
        told = lambda call: self._wire.loop.call_soon(callback, call, context=context)  # noqa: E731
        self._done.append(told)
        if self.done():
            told(self)

    async def write(self, message: Any) -> None:
        """Sends a message."""
        if self.done():
            if self._status[0] is Code.OK:
                raise asyncio.InvalidStateError("RPC already finished.")
            raise self._error()
        data = self._pack(message)
        self._sent.append(data)
        due = self._up.send(data)
        await asyncio.sleep(max(0.0, due - self._wire.loop.now))

    async def done_writing(self) -> None:
        """Says that no more is sent."""
        self._up.send(_HALF_CLOSED)

    async def read(self) -> Any:
        """Returns the next message, or `grpc.aio.EOF`."""
        data = await self._down.next()
        if data is not grpc.aio.EOF:
            return self._unpack(data)
        await asyncio.shield(self._end)
        if self._status[0] is not Code.OK:
            raise self._error()
        return grpc.aio.EOF

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    def __await__(self) -> Any:
        return self._only().__await__()

    async def _only(self) -> Any:
        try:
            await asyncio.shield(self._end)
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._status[0] is not Code.OK:
            raise self._error()
        return self._unpack(await self._down.next())

    async def initial_metadata(self) -> Any:
        """Returns the server's first metadata."""
        return await asyncio.shield(self._first)

    async def trailing_metadata(self) -> Any:
        """Returns its last."""
        await asyncio.shield(self._end)
        return self._status[2]

    async def code(self) -> Code:
        """Returns the status code."""
        await asyncio.shield(self._end)
        return self._status[0]

    async def details(self) -> str:
        """Returns the sentence of the status."""
        await asyncio.shield(self._end)
        return self._status[1]

    def _error(self) -> grpc.aio.AioRpcError:
        code, details, trailing = self._status
        return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)

    def down(self, data: bytes) -> float:
        """Takes a message of the server's on its way; returns when it arrives."""
        return self._down.send(data)


class SimulatedChannel:
    """A channel of one caller."""

    def __init__(self, wire: Wire, port: int, caller: str, *, good: bool) -> None:
        self.wire, self.port, self.caller = wire, port, caller
        self._good = good
        self._calls: list[Call] = []

    def fate(self) -> str:
        """Draws what happens to a call; empty for nothing."""
        at, quality = self.wire.drawn.random(), self.wire.quality
        if self._good:
            return ""
        for name in ("refused", "broken", "answer_lost", "repeated"):
            at -= getattr(quality, name)
            if at < 0:
                self.wire.count(name)
                return name.replace("_", " ")
        return ""

    def _call(self, path: str, pack: Any, unpack: Any, metadata: Any, timeout: Any) -> Call:
        call = Call(self, path, pack, unpack, metadata, timeout)
        self._calls = [c for c in self._calls if not c.done()] + [call]
        return call

    def _of_one(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Callable[..., Call]:
        def begin(request: Any, *, timeout: Any = None, metadata: Any = None, **_: Any) -> Call:
            call = self._call(path, request_serializer, response_deserializer, metadata, timeout)
            data = request_serializer(request)
            call._sent.append(data)
            call._up.send(data)
            call._up.send(_HALF_CLOSED)
            return call

        return begin

    unary_unary = unary_stream = _of_one

    def stream_unary(
        self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any
    ) -> Callable[..., Call]:
        """Returns what begins calls whose request is a stream, written or given."""

        def begin(
            requests: Iterable[Any] | AsyncGenerator[Any] | None = None,
            *,
            timeout: Any = None,
            metadata: Any = None,
            **_: Any,
        ) -> Call:
            call = self._call(path, request_serializer, response_deserializer, metadata, timeout)
            if isinstance(requests, AsyncGenerator):
                call.writing = self.wire.loop.create_task(_write_all(call, requests))
            elif requests is not None:
                for request in requests:
                    call._up.send(request_serializer(request))
                call._up.send(_HALF_CLOSED)
            return call

        return begin

    stream_stream = stream_unary

    async def close(self, grace: float | None = None) -> None:
        """Ends what is under way."""
        for call in self._calls:
            call.cancel()


async def _write_all(call: Call, requests: AsyncGenerator[Any]) -> None:
    """Sends what is made while it is sent; once the call has ended no more is asked for, as gRPC has it."""
    async with aclosing(requests):
        async for request in requests:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it ended meanwhile
                await call.write(request)
            if call.done():
                return
    await call.done_writing()
