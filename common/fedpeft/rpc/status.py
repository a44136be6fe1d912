"""Carries the error tree across gRPC: canonical code, one sentence, ErrorInfo, RetryInfo, field violations; and back.

The shape is Google's AIP-193. `docs/errors.md` lists every reason.
"""

from __future__ import annotations

from typing import NoReturn, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from fedpeft import errors
from fedpeft.errors import (
    Aborted,
    FedpeftError,
    Internal,
    LocalError,
    ResourceExhausted,
    ServerUnreachable,
    Unavailable,
)
from fedpeft.untrusted_text import plain

DOMAIN = "fedpeft"
MAX_MESSAGE = 4096
"""Most characters of a server's sentence."""


def to_status(error: FedpeftError, *, names_places: bool = False) -> status_pb2.Status:
    """Returns the rich status of an error of the tree, which names places of the server only where that is said."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    details = [_any(info)]
    if error.retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_s * 1e9))
        details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    if error.fields:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=text) for field, text in error.fields
        ]
        details.append(_any(error_details_pb2.BadRequest(field_violations=violations)))
    message = error.message if names_places else error.for_sites or error.message
    return status_pb2.Status(code=code_pb2.Code.Value(error.status), message=message, details=details)


_BROKEN_OFF = "; if that repeats, a proxy between may take small requests only (client_max_body_size of nginx is 1 MB)"
"""Stands behind a call that was broken off by something that gives no reason; a server of this project does."""


def from_rpc_error(error: grpc.aio.AioRpcError) -> FedpeftError:
    """Returns the error that the server raised, as an instance of the same class.

    A reason without a class, from a newer server, is read by its status code: the class at the head of that family, or
    `Unavailable` where a limit or an abort comes without a retry hint, since the call may succeed later. A status
    without ErrorInfo of this project comes from gRPC itself or a proxy: UNAVAILABLE is `ServerUnreachable`, anything
    else `Internal`. So is one that cannot be read, or that claims to be an error which never crosses the network. What
    a server says is cut to `MAX_MESSAGE` characters that a terminal shows.
    """
    message = _said(error.details() or "")
    try:
        return _found(error, message)
    except (ValueError, DecodeError):  # the details are no Status, or not that of this call
        return Internal(f"the call failed with {error.code().name} and details that cannot be read: {message}")


def _found(error: grpc.aio.AioRpcError, message: str) -> FedpeftError:
    status = rpc_status.from_call(cast(grpc.Call, error))
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    hinted = False
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad)
        hinted |= detail.Unpack(retry)
    if status is None or info.domain != DOMAIN:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return ServerUnreachable(f"the server cannot be reached: {message}")
        hint = _BROKEN_OFF if "RST_STREAM" in message else ""
        return Internal(f"the call failed with {error.code().name}: {message}{hint}")
    fields = tuple((_said(v.field), _said(v.description)) for v in bad.field_violations)
    cls = errors.of_reason(info.reason, FedpeftError)
    known = cls is not FedpeftError
    if not known:
        cls = _of_status(error.code(), hinted)
    if issubclass(cls, LocalError):
        cls = Internal
    where = "the server's disk is full: " if cls is errors.DiskFull else ""  # it must not be sought on this side
    found = cls(where + _said(status.message), fields)
    found.retry_s = max(0.0, retry.retry_delay.ToNanoseconds() / 1e9) if hinted else None
    if not known:
        found.reason = _said(info.reason)
    return found


def _of_status(code: grpc.StatusCode, hinted: bool) -> type[FedpeftError]:
    """Returns the class of an error whose reason has none."""
    cls = errors.of_status(code.name, Internal)
    return Unavailable if cls in (Aborted, ResourceExhausted) and not hinted else cls


def _said(text: str) -> str:
    return plain(text[:MAX_MESSAGE])


def _any(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


async def abort(
    context: grpc.aio.ServicerContext[object, object], error: FedpeftError, *, names_places: bool = False
) -> NoReturn:
    """Ends a call on the server with the status of `error`; see `to_status`."""
    status = rpc_status.to_status(to_status(error, names_places=names_places))
    await context.abort(status.code, status.details, status.trailing_metadata)
