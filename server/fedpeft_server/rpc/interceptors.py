"""What happens around every call: it is admitted, its bytes are counted, its errors become statuses, it is timed.

Notable: an answer is serialized here and not by gRPC, so that one which does not fit into a message becomes a status of
the error tree while there is still a call to end with it. Handlers send lists in pages; this is the net below them.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import structlog

from fedpeft.errors import (
    AnswerTooLarge,
    FedpeftError,
    Internal,
    LocalError,
    PermissionDenied,
    TransferStalled,
    Unauthenticated,
)
from fedpeft.status import abort
from fedpeft.waits import STALL_S
from fedpeft.wire import MESSAGE_LIMIT_BYTES
from fedpeft_server.access.admission import Admission
from fedpeft_server.call import CALL, Call
from fedpeft_server.metrics import Metrics
from fedpeft_server.traffic import Ledger

log = structlog.get_logger()

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Continuation: TypeAlias = "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]"


class Gate(grpc.aio.ServerInterceptor):
    """Stands in front of every handler.

    It admits the call or refuses it, meters the serialized messages, turns errors of the tree into statuses (and
    everything else, a fault of the data folder included, into INTERNAL with a line in the log), and counts calls by
    method and code. gRPC's own services (health, reflection) pass through it too.
    """

    def __init__(self, admission: Admission, metrics: Metrics, ledger: Ledger) -> None:
        self.admission = admission
        self._metrics = metrics
        self._ledger = ledger

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler | None:
        """Returns the handler of one call with everything around it."""
        handler = await continuation(details)
        if handler is None:
            return handler
        call = Call(details.method)
        CALL.set(call)
        return self._metered(self._guarded(handler, call), call)

    def _metered(self, handler: Handler, call: Call) -> Handler:
        """Counts messages where they are (de)serialized, the one place where their size is known for nothing."""
        deserialize, ledger = handler.request_deserializer, self._ledger

        def receive(data: bytes) -> Any:
            ledger.wire(call, "up", len(data))
            return deserialize(data) if deserialize else data

        return handler._replace(request_deserializer=receive)  # type: ignore[attr-defined, no-any-return]

    def _encoded(self, handler: Handler, call: Call) -> Callable[[Any], bytes]:
        """Returns what makes bytes of an answer, counts them, and refuses those that no caller could receive.

        What is bytes already passes, so that it can stand both in front of gRPC and as its serializer.
        """
        serialize, ledger = handler.response_serializer, self._ledger

        def encode(message: Any) -> bytes:
            if isinstance(message, bytes):
                return message
            data: bytes = serialize(message) if serialize else bytes(message)
            if len(data) > MESSAGE_LIMIT_BYTES:
                name = call.method.rpartition("/")[2]
                raise AnswerTooLarge(
                    f"the answer of {name} has {len(data):,} bytes; {MESSAGE_LIMIT_BYTES:,} is the most that a message "
                    "may have. Ask for less at once (a smaller page, one run), or tell the server's operator"
                )
            ledger.wire(call, "down", len(data))
            return data

        return encode

    def _guarded(self, handler: Handler, call: Call) -> Handler:
        encode = self._encoded(handler, call)
        handler = handler._replace(response_serializer=encode)  # type: ignore[attr-defined]
        if handler.response_streaming:
            kind = "stream_stream" if handler.request_streaming else "unary_stream"
            inner_stream = getattr(handler, kind)

            async def stream(request: Any, context: Context) -> None:
                async with _Boundary(self, call, context), self.admission.admitted(call, context.auth_context()):
                    answer = inner_stream(request, context)
                    if inspect.isawaitable(answer):  # gRPC's own health service writes by itself
                        await answer
                    else:
                        await self._send(answer, call, context, encode)

            return handler._replace(**{kind: stream})  # type: ignore[attr-defined, no-any-return]
        kind = "stream_unary" if handler.request_streaming else "unary_unary"
        inner = getattr(handler, kind)

        async def unary(request: Any, context: Context) -> Any:
            async with _Boundary(self, call, context), self.admission.admitted(call, context.auth_context()):
                return encode(await inner(request, context))

        return handler._replace(**{kind: unary})  # type: ignore[attr-defined, no-any-return]

    async def _send(
        self, messages: AsyncGenerator[Any, None], call: Call, context: Context, encode: Callable[[Any], bytes]
    ) -> None:
        """Sends what a handler yields; the handler is closed, and gives back what it holds, before an error is sent.

        Raises:
            AnswerTooLarge: If one of them is larger than a message may be.
            CertificateExpired: If the caller's certificate has ended meanwhile.
            TransferStalled: If the client reads nothing for too long.
        """
        async with aclosing(messages):
            async for message in messages:
                self.admission.check(call)
                data = encode(message)
                try:
                    async with asyncio.timeout(STALL_S):
                        await context.write(data)
                except TimeoutError:
                    raise TransferStalled(
                        f"nothing was read for {STALL_S:.0f} s; continue at the first byte missing"
                    ) from None

    def finished(self, call: Call, code: str, seconds: float) -> None:
        """Books a call that has ended."""
        self._ledger.close(call)
        self._metrics.requests.labels(call.method, code).inc()
        self._metrics.request_seconds.labels(call.method).observe(seconds)

    async def audited(self, call: Call, error: FedpeftError, peer: str) -> None:
        """Has a refusal written into the audit log; the caller is refused whether that succeeds or not."""
        try:
            await self.admission.refused(call, error, peer)
        except FedpeftError as fault:
            log.error("a refusal could not be written into the audit log", method=call.method, message=fault.message)


class _Boundary:
    """The one boundary that errors cross on their way to a client."""

    def __init__(self, gate: Gate, call: Call, context: Context) -> None:
        self._gate = gate
        self._call = call
        self._context = context

    async def __aenter__(self) -> None:
        self._began = time.perf_counter()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        status = _domain_error(error, self._call.method) if error else None
        code = status.status if status else "OK" if error is None else "CANCELLED"
        self._gate.finished(self._call, code, time.perf_counter() - self._began)
        if isinstance(status, Unauthenticated | PermissionDenied):
            await self._gate.audited(self._call, status, self._context.peer())
        if status:
            await abort(self._context, status)


def _domain_error(error: BaseException, method: str) -> FedpeftError | None:
    """Returns the error to answer with; None for a call that its caller has left."""
    if isinstance(error, AnswerTooLarge):
        log.error("an answer was too large to be sent", method=method, message=error.message)
        return error
    if isinstance(error, FedpeftError) and not isinstance(error, LocalError):
        log.info("refused", method=method, reason=error.reason, message=error.message)
        return error
    if isinstance(error, asyncio.CancelledError | GeneratorExit | grpc.aio.AbortError):
        return None
    log.error("a call failed through a fault of the server", method=method, exc_info=error)
    return Internal(
        f"the server failed in {method.rpartition('/')[2]}: {type(error).__name__}; its log has the details"
    )
