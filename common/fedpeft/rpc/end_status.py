"""The status with which a server ended a call while its request was still being sent."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import grpc

LOOK_S = 0.5
LOOKS = 100
"""Time for which the server's status is looked for, seconds, and the number of looks."""
_CORE = "Internal error from Core"

Call = grpc.aio.StreamUnaryCall[Any, Any]
T = TypeVar("T")


class EndStatus:
    """The end of one call whose request is a stream; made before anything is written to the call.

    gRPC answers a write that meets a call which the server has just ended with an internal error of its own, and that
    error replaces the server's status if it was there, or stands before it for a moment.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._seen: list[grpc.aio.AioRpcError] = []
        call.add_done_callback(lambda _: self._seen.append(_status(call)))

    async def error(self) -> grpc.aio.AioRpcError:
        """Returns the server's status of a call that has ended, or UNAVAILABLE if none comes: the connection broke."""
        for _ in range(LOOKS):
            for status in (*self._seen, _status(self._call)):
                if status.code() is not grpc.StatusCode.INTERNAL or status.details() != _CORE:
                    return status
            await asyncio.sleep(LOOK_S / LOOKS)
        return grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the upload broke off"
        )


def _status(call: Call) -> grpc.aio.AioRpcError:
    """Returns the status of a call that has ended, without giving anything else a chance to run."""
    code, details = _at_once(call.code()), _at_once(call.details())
    return grpc.aio.AioRpcError(code, _at_once(call.initial_metadata()), _at_once(call.trailing_metadata()), details)


def _at_once(answer: Coroutine[Any, Any, T]) -> T:
    """Returns what a coroutine that need not wait returns."""
    try:
        answer.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise RuntimeError("the call has not ended")
