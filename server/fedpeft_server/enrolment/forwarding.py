"""Forwarding: hands the calls of strangers to the daemon, with nothing read of those that strangers may not make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from fedpeft_server.access import bounds
from fedpeft_server.access.peers import FORWARDED_KEY
from fedpeft_server.access.rights import RIGHTS
from fedpeft_server.timing import Timing

Context = Any
"""gRPC's context of a call."""


class Forwarding(grpc.GenericRpcHandler):
    """Takes every call and makes it once more, to the daemon.

    Args:
        daemon: The daemon's socket.
        peer: Returns where a connection comes from.
        timing: Longest wait for the message of a caller, and for the daemon's answer.
    """

    def __init__(self, daemon: grpc.aio.Channel, peer: Callable[[str], str], timing: Timing) -> None:
        self._call_s = timing.enrolment_call_s
        self._daemon = daemon
        self._peer = peer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler of a call."""
        method = str(handler_call_details.method)
        again: Any = self._daemon.unary_unary(method)

        async def forward(_: AsyncIterator[bytes], context: Context) -> None:
            data = await self._message(method, context)
            peer = ((FORWARDED_KEY, self._peer(str(context.peer()))),)
            try:
                call = again(data, metadata=peer, timeout=self._call_s)
                answer = await call
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
            context.set_trailing_metadata(tuple(await call.trailing_metadata() or ()))
            await context.write(answer)

        return grpc.stream_stream_rpc_method_handler(forward)

    async def _message(self, method: str, context: Context) -> bytes:
        """Returns the message of a call; an empty one for a call that the daemon will refuse whatever it says."""
        if None not in RIGHTS.get(method, ()):
            return b""
        try:
            async with asyncio.timeout(self._call_s):
                data = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no message came within {self._call_s:.0f} s; call again")
        name, most = method.rpartition("/")[2], bounds.CALLS[method].message_bytes
        if data is grpc.aio.EOF:
            return b""
        if len(data) > most:
            text = f"a message to {name} has {len(data)} bytes; at most {most} are taken"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        return bytes(data)
