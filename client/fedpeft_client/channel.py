"""The connection to the server: one channel, who is calling on every call, errors as classes of the tree."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable
from types import TracebackType
from typing import Protocol, Self, TypeVar

import grpc

from fedpeft import status
from fedpeft.errors import FedpeftError, ServerUnreachable
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.wire import CLIENT_KEY, INSTANCE_KEY, MESSAGE_LIMIT_BYTES, PROCESS_KEY
from fedpeft_client.patience import AWAIT_S, CALL_S

_SERVICE = "fedpeft.v1.FederationService"
_RETRIED = ("Register", "AwaitRound", "AnswerOffer", "PullAdapter", "GetUpload", "Withdraw", "PushEvaluation")
"""Every call but PushUpdate, which must ask first where the upload stands."""

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": _SERVICE, "method": method} for method in _RETRIED],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}

_OPTIONS: list[tuple[str, str | int]] = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_http_proxy", 0),  # a proxy between plain-text ends on one machine only breaks them
]

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)


class _Unary(Protocol[RequestT, ResponseT]):
    def __call__(
        self, request: RequestT, /, *, timeout: float, metadata: grpc.aio.Metadata
    ) -> Awaitable[ResponseT]: ...


class Channel:
    """The server as this client sees it. Opened inside a running event loop.

    Every method raises the class of the error tree that the server raised, and `ServerUnreachable` if there was no
    answer.

    Attributes:
        stub: For the streaming calls, which take `metadata` themselves.
        metadata: Who is calling.
    """

    def __init__(self, server: str, name: str, instance: str) -> None:
        self._server = server
        self._channel = grpc.aio.insecure_channel(server, options=_OPTIONS)
        self.stub = pb_grpc.FederationServiceStub(self._channel)
        process = secrets.token_hex(16)
        self.metadata = grpc.aio.Metadata((CLIENT_KEY, name), (INSTANCE_KEY, instance), (PROCESS_KEY, process))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Announces the client."""
        return await self._call(self.stub.Register, request)

    async def await_round(self, run: str, *, until_finished: bool) -> pb.AwaitRoundResponse:
        """Asks for work; the server holds the answer back for a while if there is none."""
        request = pb.AwaitRoundRequest(run=run, until_finished=until_finished)
        return await self._call(self.stub.AwaitRound, request, AWAIT_S)

    async def answer_offer(self, request: pb.AnswerOfferRequest) -> None:
        """Says whether this client takes part in a run."""
        await self._call(self.stub.AnswerOffer, request)

    async def get_upload(self, ticket: str, sha256: bytes) -> pb.GetUploadResponse:
        """Asks where an upload stands."""
        return await self._call(self.stub.GetUpload, pb.GetUploadRequest(ticket=ticket, sha256=sha256))

    async def withdraw(self, ticket: str, reason: str) -> pb.WithdrawResponse:
        """Gives a ticket up; the reason is cut to the 1,024 characters that the protocol takes."""
        return await self._call(self.stub.Withdraw, pb.WithdrawRequest(ticket=ticket, reason=reason[:1024]))

    async def push_evaluation(self, request: pb.PushEvaluationRequest) -> None:
        """Reports figures of a version."""
        await self._call(self.stub.PushEvaluation, request)

    def error(self, error: grpc.aio.AioRpcError) -> FedpeftError:
        """Returns the error of the tree that a failed call stands for."""
        if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return ServerUnreachable(f"{self._server} did not answer in time")
        found = status.from_rpc_error(error)
        if isinstance(found, ServerUnreachable):
            return ServerUnreachable(f"{self._server} cannot be reached: {error.details()}")
        return found

    async def _call(
        self,
        method: _Unary[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float = CALL_S,
    ) -> ResponseT:
        try:
            return await method(request, timeout=timeout_s, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
