"""The way of a call: it is paced and admitted, then read and measured, answered, counted and timed.

Notable: every handler is given to gRPC as one of streams, a unary one included. gRPC reads the message of a unary call
before it asks anybody; of a stream it reads what is asked for, and `rpc.incoming` asks once the caller is admitted. The
answer is serialized inside the call, so that one which does not fit into a message becomes a status of the error tree
while there is still a call to end with it. Handlers send lists in pages; this is the net below them.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import structlog
from google.protobuf.message import Message
from prometheus_client import Counter, Histogram

from fedpeft.errors import (
    AnswerTooLarge,
    FedpeftError,
    Internal,
    LocalError,
    MessageTooLarge,
    PermissionDenied,
    TransferStalled,
    Unauthenticated,
)
from fedpeft.rpc.status import abort
from fedpeft.rpc.timing import STALL_S
from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft_server.access import bounds
from fedpeft_server.access.admission import Admission, peer_of
from fedpeft_server.access.call import CALL, Call
from fedpeft_server.metrics import Metrics
from fedpeft_server.rpc.caller_log import CallerLog
from fedpeft_server.rpc.requests import Requests
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.uploads.incoming import Context, Incoming, ReceiveSlots, Refused

log = structlog.get_logger()

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class AdmissionInterceptor(grpc.aio.ServerInterceptor):
    """Stands in front of every handler.

    It admits the call or refuses it, then reads, measures and parses its messages, turns errors of the tree into
    statuses (and everything else, a fault of the data folder included, into INTERNAL with a line in the log), and
    counts calls by method and code. gRPC's own services (health, reflection) pass through it too.
    """

    def __init__(
        self, admission: Admission, metrics: Metrics, byte_counter: ByteCounter, caller_log: CallerLog
    ) -> None:
        self.admission = admission
        self.log = caller_log
        self._metrics = metrics
        self._byte_counter = byte_counter
        self._slots = ReceiveSlots(bounds.RECEIVING)
        self._series: dict[tuple[str, str], tuple[Counter, Histogram]] = {}

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Returns the handler of one call with everything around it."""
        handler = await continuation(details)
        call = Call(details.method)
        CALL.set(call)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(self._unknown(call))
        return self._guarded(handler, call)

    def _guarded(self, handler: Handler, call: Call) -> Handler:
        """Returns the handler behind the interceptor; messages are counted where they are (de)serialized."""
        requests = _requests(handler, call.method)

        def receive(data: bytes) -> Any:
            self._byte_counter.wire(call, "up", len(data))
            call.moved()
            try:
                return requests.take(data)
            except FedpeftError as error:
                return Refused(error)

        async def serve(_: AsyncIterator[Any], context: Context) -> None:
            async with _Boundary(self, call, context), self.admission.admitted(call, context):
                incoming = Incoming(self._slots, call, context)
                request = incoming if handler.request_streaming else await incoming.only()
                answer = _behaviour(handler)(request, context)
                if handler.response_streaming and not inspect.isawaitable(answer):
                    await self._send(answer, call, context)
                elif (message := await answer) is not None:  # gRPC's own health service writes by itself
                    await context.write(message)

        return grpc.stream_stream_rpc_method_handler(serve, receive, self._encoder(handler, call))

    def _encoder(self, handler: Handler, call: Call) -> Callable[[Any], bytes]:
        """Returns what makes bytes of an answer, counts them, and refuses those that no caller could receive.

        A message that carries a chunk is bytes already, encoded once for all who get it.
        """
        serialize = handler.response_serializer or bytes

        def encode(message: Any) -> bytes:
            data: bytes = message if isinstance(message, bytes) else serialize(message)
            if len(data) > MESSAGE_LIMIT_BYTES:
                name = call.short_name
                raise AnswerTooLarge(
                    f"the answer of {name} has {len(data):,} bytes; {MESSAGE_LIMIT_BYTES:,} is the most that a message "
                    "may have. Ask for less at once (a smaller page, one run), or tell the server's operator"
                )
            self._byte_counter.wire(call, "down", len(data))
            call.moved()
            return data

        return encode

    def _unknown(self, call: Call) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
        """Returns the handler of calls to methods that there are not: they are paced as others are."""

        async def refuse(_: AsyncIterator[bytes], context: Context) -> None:
            async with _Boundary(self, call, context), self.admission.paced(call, context):
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method[:128]}")

        return refuse

    async def _send(self, messages: AsyncGenerator[Any, None], call: Call, context: Context) -> None:
        """Sends what a handler yields; the handler is closed, and gives back what it holds, before an error is sent.

        Raises:
            AnswerTooLarge: If one of them is larger than a message may be.
            CertificateExpired: If the caller's certificate has ended meanwhile.
            TransferStalled: If the client reads nothing for too long.
            TurnOver: Likewise, once its slot has had its time and others wait.
        """
        async with aclosing(messages):
            async for message in messages:
                self.admission.check(call)
                try:
                    async with call.slot.bounded(STALL_S) if call.slot else asyncio.timeout(STALL_S):
                        await context.write(message)
                except TimeoutError:
                    raise TransferStalled(
                        f"nothing was read for {STALL_S:.0f} s; continue at the first byte missing"
                    ) from None

    def finished(self, call: Call, code: str, seconds: float) -> None:
        """Books a call that has ended."""
        self._byte_counter.close(call)
        method = call.method if call.method in bounds.CALLS else "unknown"
        if (method, code) not in self._series:  # by their labels that takes longer than to count the call
            self._series[method, code] = (
                self._metrics.requests.labels(method, code),
                self._metrics.request_seconds.labels(method),
            )
        count, duration = self._series[method, code]
        count.inc()
        duration.observe(seconds)
        who = call.client or str(call.caller)
        log.debug("call", method=method, code=code, caller=who, seconds=round(seconds, 4))

    async def audited(self, call: Call, error: FedpeftError, peer: str) -> None:
        """Has a refusal written into the audit log; the caller is refused whether that succeeds or not."""
        try:
            await self.admission.refused(call, error, peer)
        except FedpeftError as fault:
            log.error("cannot write a refusal to the audit log", method=call.method, message=fault.message)


class _Boundary:
    """The one boundary that errors cross on their way to a client."""

    def __init__(self, interceptor: AdmissionInterceptor, call: Call, context: Context) -> None:
        self._interceptor = interceptor
        self._call = call
        self._context = context

    async def __aenter__(self) -> None:
        self._began = time.perf_counter()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        status = _domain_error(error, self._call, self._interceptor.log) if error else None
        code = status.status if status else "OK" if error is None else "CANCELLED"
        self._interceptor.finished(self._call, code, time.perf_counter() - self._began)
        if isinstance(status, MessageTooLarge):
            await self._interceptor.admission.delay_refusal()
        if isinstance(status, Unauthenticated | PermissionDenied):
            await self._interceptor.audited(self._call, status, peer_of(self._context))
        if status:
            await abort(self._context, status, names_places=self._call.party.sees_places)


def _domain_error(error: BaseException, call: Call, caller_log: CallerLog) -> FedpeftError | None:
    """Returns the error to answer with; None for a call that its caller has left."""
    if isinstance(error, AnswerTooLarge):
        caller_log.failed(error)
        return error
    if isinstance(error, FedpeftError) and not isinstance(error, LocalError):
        caller_log.refused(error)
        return error
    if isinstance(error, asyncio.CancelledError | GeneratorExit | grpc.aio.AbortError):
        return None
    caller_log.failed(error)
    return Internal(
        f"the server failed in {call.method.rpartition('/')[2]}: {type(error).__name__}; its log has the details"
    )


def _behaviour(handler: Handler) -> Callable[[Any, Context], Any]:
    """Returns what a handler does, of its four kinds."""
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    behaviour: Callable[[Any, Context], Any] = getattr(handler, kind)
    return behaviour


def _requests(handler: Handler, method: str) -> Requests:
    """Returns what takes a call's messages; generated parsers are methods of the message's class."""
    parse = handler.request_deserializer or bytes
    kind = getattr(parse, "__self__", None)
    of_protobuf = isinstance(kind, type) and issubclass(kind, Message)
    return Requests(method.rpartition("/")[2], bounds.CALLS[method], kind if of_protobuf else None, parse)
