"""The server's status of a call that it ends while the request is being sent."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue

from fedpeft.rpc.end_status import EndStatus

CALLS = 200


@pytest.fixture
async def method() -> AsyncIterator[grpc.aio.StreamUnaryMultiCallable]:
    """A call that is ended by its server after the first message of the request."""

    async def refuse(messages: AsyncIterator[BytesValue], context: grpc.aio.ServicerContext) -> Empty:
        async for _ in messages:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "enough")
        raise AssertionError("no message came")

    handler = grpc.stream_unary_rpc_method_handler(refuse, BytesValue.FromString, Empty.SerializeToString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Refuse": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel.stream_unary("/test/Refuse", BytesValue.SerializeToString, Empty.FromString)
    await server.stop(None)


async def test_a_late_write_does_not_hide_what_the_server_said(method: grpc.aio.StreamUnaryMultiCallable) -> None:
    async def messages() -> AsyncIterator[BytesValue]:
        while True:
            yield BytesValue(value=bytes(100))
            await asyncio.sleep(pauses.random() * 3e-4)

    pauses, hidden = random.Random(0), 0
    for _ in range(CALLS):
        call = method(messages())
        end = EndStatus(call)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        hidden += caught.value.code() is grpc.StatusCode.INTERNAL
        status = await end.error()
        assert (status.code(), status.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "enough")
    print(f"the call itself said otherwise {hidden} times of {CALLS}")  # some 50; none would not be a fault of ours
