"""The server's end of calls without a network: what stands for `grpc.aio.server`, and calls as handlers have them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import grpc

from .loop import LIFE, Life
from .wire import _HALF_CLOSED, OUTSIDE, Call, Code, Line, Wire


class SimulatedServer:
    """Stands for `grpc.aio.server`; belongs to the life that makes it."""

    def __init__(self, wire: Wire, interceptors: Iterable[Any]) -> None:
        life = LIFE.get()
        assert life is not None
        self.life: Life = life
        self._wire = wire
        (self._gate,) = interceptors
        self._handlers: list[Any] = []
        self._port = 0
        self._context = contextvars.copy_context()
        self._calls: dict[ServedCall, None] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[Any]) -> None:
        """Takes services."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Leaves the methods to their service's handler."""

    def add_insecure_port(self, address: str) -> int:
        """Takes a port."""
        self._port = int(address.rpartition(":")[2])
        return self._port

    async def start(self) -> None:
        """Begins to listen."""
        if self._port:
            self._wire.servers[self._port] = self

    async def stop(self, grace: float | None) -> None:
        """Ends."""
        self._wire.servers.pop(self._port, None)
        for call in list(self._calls):
            call.left()

    def begin(self, call: Call | None, path: str, metadata: tuple[Any, ...], up: Line) -> ServedCall:
        """Has a call handled."""
        served = ServedCall(self._wire, call, metadata, up)
        self._calls[served] = None
        served.task = task = self._context.run(
            lambda: self._wire.loop.create_task(self._handle(served, path), context=contextvars.copy_context())
        )
        task.add_done_callback(lambda _: self._over(served), context=OUTSIDE)
        return served

    def _over(self, served: ServedCall) -> None:
        self._calls.pop(served)
        served.over()

    async def _handle(self, served: ServedCall, path: str) -> None:
        details = SimpleNamespace(method=path, invocation_metadata=served.metadata)

        async def found(_: Any) -> Any:
            return next((h for each in self._handlers if (h := each.service(details)) is not None), None)

        handler = await self._gate.intercept_service(found, details)
        served.unpack = handler.request_deserializer or bytes
        served.pack = handler.response_serializer or bytes
        await handler.stream_stream(None, served)


class ServedCall:
    """A call as the server's handler has it: gRPC's servicer context."""

    def __init__(self, wire: Wire, call: Call | None, metadata: tuple[Any, ...], up: Line) -> None:
        self._wire, self._call, self._up = wire, call, up
        self.metadata = metadata
        self.task: asyncio.Task[None] | None = None
        self.unpack: Callable[[bytes], Any] = bytes
        self.pack: Callable[[Any], bytes] = bytes
        self._last = 0.0
        self._first_sent = False
        self._trailing: tuple[Any, ...] = ()
        self._status: tuple[Code, str, tuple[Any, ...]] | None = None
        self._done: list[Callable[[Any], object]] = []

    # gRPC's.

    async def read(self) -> Any:
        data = await self._up.next()
        if data in (_HALF_CLOSED, grpc.aio.EOF):
            self._up.end()
            return grpc.aio.EOF
        return self.unpack(data)

    async def write(self, message: Any) -> None:
        await self.send_initial_metadata(())
        data = self.pack(message)
        if self._call is not None:
            self._last = self._call.down(data)
            await asyncio.sleep(max(0.0, self._last - self._wire.loop.now))

    async def send_initial_metadata(self, metadata: Iterable[Any]) -> None:
        if not self._first_sent and self._call is not None:
            self._last = self._wire.soon()
            self._wire.later(self._last, self._call.began, tuple(metadata))
        self._first_sent = True

    def set_trailing_metadata(self, metadata: Iterable[Any]) -> None:
        self._trailing = tuple(metadata)

    async def abort(self, code: Code, details: str = "", trailing_metadata: Iterable[Any] = ()) -> None:
        self._status = code, details, (*self._trailing, *trailing_metadata)
        raise grpc.aio.AbortError

    def invocation_metadata(self) -> tuple[Any, ...]:
        return self.metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def auth_context(self) -> dict[str, Any]:
        return {}

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        context = contextvars.copy_context()
        self._done.append(lambda served: self._wire.loop.call_soon(callback, served, context=context))

    def cancelled(self) -> bool:
        return self.task is not None and self.task.cancelled()

    def done(self) -> bool:
        return self.task is not None and self.task.done()

    # The world's.

    def left(self) -> None:
        """Has the handler cancelled: its caller is gone."""
        self._call = None
        self._up.end()
        if self.task is not None and not self.task.done():
            self.task.cancel()

    def over(self) -> None:
        """Sends the status of a handler that has ended."""
        assert self.task is not None
        error = None if self.task.cancelled() else self.task.exception()
        status = self._status or (Code.OK, "", self._trailing)
        if error is not None and not isinstance(error, grpc.aio.AbortError):
            status = Code.UNKNOWN, f"unexpected {type(error).__name__}: {error}", ()
        for callback in self._done:
            callback(self)
        if self._call is not None and not self.task.cancelled():
            due = max(self._last, self._wire.loop.now) + self._wire.drawn.uniform(1e-6, self._wire.quality.longest_s)
            self._wire.later(due, self._call.answered, status)
