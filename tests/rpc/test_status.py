"""The status of a call, read as an error of the tree: of a reason that has a class here, and of one that has none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.empty_pb2 import Empty
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from fedpeft import errors
from fedpeft.errors import FedpeftError
from fedpeft.rpc.status import MAX_MESSAGE, abort, from_rpc_error, to_status

Read = Callable[[status_pb2.Status | FedpeftError], Awaitable[FedpeftError]]


@pytest.fixture
async def read() -> AsyncIterator[Read]:
    """Sends a status through a real server and returns the error that its caller sees."""
    answer: list[status_pb2.Status | FedpeftError] = []

    async def refuse(_: Empty, context: grpc.aio.ServicerContext) -> Empty:
        status = answer.pop()
        if isinstance(status, FedpeftError):
            await abort(context, status)
        rich = rpc_status.to_status(status)
        await context.abort(rich.code, rich.details, rich.trailing_metadata)

    handler = grpc.unary_unary_rpc_method_handler(refuse, Empty.FromString, Empty.SerializeToString)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Refuse": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/test/Refuse", Empty.SerializeToString, Empty.FromString)

        async def call(status: status_pb2.Status | FedpeftError) -> FedpeftError:
            answer.append(status)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await method(Empty())
            return from_rpc_error(caught.value)

        yield call
    await server.stop(None)


def _status(
    code: grpc.StatusCode, reason: str, *, domain: str = "fedpeft", retry_s: int | None = None
) -> status_pb2.Status:
    details = [any_pb2.Any(), any_pb2.Any()]
    details[0].Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    if retry_s is None:
        details.pop()
    else:
        details[1].Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=retry_s)))
    return status_pb2.Status(code=code.value[0], message="the sentence", details=details)


@pytest.mark.parametrize("cls", [cls for cls in errors.tree() if cls.status != "UNKNOWN"])
async def test_an_error_of_the_tree_is_read_as_the_same_class(read: Read, cls: type[FedpeftError]) -> None:
    sent = cls("what is wrong", (("rounds.count", "must be at least 1"),))
    found = await read(sent)
    assert type(found) is cls and found.reason == cls.reason
    assert (
        found.message.endswith(cls.for_sites or "what is wrong")
        and found.fields == sent.fields
        and found.retry_s == sent.retry_s
    )
    assert to_status(sent, names_places=True).message == "what is wrong"


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        ("UNAVAILABLE", errors.Unavailable),
        ("RESOURCE_EXHAUSTED", errors.Unavailable),
        ("ABORTED", errors.Unavailable),
        ("INVALID_ARGUMENT", errors.InvalidArgument),
        ("OUT_OF_RANGE", errors.OutOfRange),
        ("NOT_FOUND", errors.NotFound),
        ("ALREADY_EXISTS", errors.AlreadyExists),
        ("FAILED_PRECONDITION", errors.FailedPrecondition),
        ("PERMISSION_DENIED", errors.PermissionDenied),
        ("UNAUTHENTICATED", errors.Unauthenticated),
        ("DATA_LOSS", errors.DataLoss),
        ("INTERNAL", errors.Internal),
        ("UNKNOWN", errors.Internal),
        ("DEADLINE_EXCEEDED", errors.Internal),
        ("UNIMPLEMENTED", errors.Internal),
        ("CANCELLED", errors.Internal),
    ],
)
async def test_a_reason_that_has_no_class_is_read_by_its_status(read: Read, code: str, cls: type[FedpeftError]) -> None:
    found = await read(_status(grpc.StatusCode[code], "OF_A_NEWER_SERVER"))
    assert type(found) is cls
    assert (found.message, found.reason, found.retry_s) == ("the sentence", "OF_A_NEWER_SERVER", None)


@pytest.mark.parametrize(
    ("code", "cls"), [("RESOURCE_EXHAUSTED", errors.ResourceExhausted), ("ABORTED", errors.Aborted)]
)
async def test_a_reason_that_has_no_class_keeps_its_retry_hint(read: Read, code: str, cls: type[FedpeftError]) -> None:
    found = await read(_status(grpc.StatusCode[code], "OF_A_NEWER_SERVER", retry_s=3))
    assert type(found) is cls and found.retry_s == 3.0


# Not twice the bound: of metadata above 8 KiB gRPC refuses some at random.
@pytest.mark.parametrize("reason", ["UNKNOWN", "", "R" * (MAX_MESSAGE + 1000), "\x1b[31mred", "STATE_INVALID"])
async def test_a_reason_that_no_server_should_send_is_harmless(read: Read, reason: str) -> None:
    found = await read(_status(grpc.StatusCode.NOT_FOUND, reason))
    assert type(found) is (errors.Internal if reason == "STATE_INVALID" else errors.NotFound)
    assert len(found.reason) <= MAX_MESSAGE and "\x1b" not in found.reason


@pytest.mark.parametrize(
    ("code", "cls"), [("UNAVAILABLE", errors.ServerUnreachable), ("RESOURCE_EXHAUSTED", errors.Internal)]
)
async def test_the_status_of_a_proxy_is_none_of_the_server(read: Read, code: str, cls: type[FedpeftError]) -> None:
    found = await read(_status(grpc.StatusCode[code], "DISK_FULL", domain="proxy.example"))
    assert type(found) is cls and found.message.endswith("the sentence")


async def test_a_call_that_a_proxy_breaks_off_has_a_hint_at_its_limits(read: Read) -> None:
    broken = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message="Stream removed (RST_STREAM, code 2)")
    found = await read(broken)
    assert type(found) is errors.Internal and "client_max_body_size" in found.message
