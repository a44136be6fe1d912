"""The connection to the server: who is calling on every call, errors as classes of the tree.

Notable: with another certificate comes another connection. Calls that are under way end on the old one, which is closed
after the last of them; a certificate is renewed on a connection of its own, past what holds the other up; and why
there is no connection is looked for once a minute, not at every attempt.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message

from fedpeft.errors import CertificateExpired, FedpeftError, ServerUnreachable
from fedpeft.identity.folder import Identity
from fedpeft.rpc import diagnosis, status
from fedpeft.rpc.channel import NO_RETRIES, open_channel
from fedpeft.rpc.chunk_messages import WrittenChunk
from fedpeft.rpc.diagnosis import Trust
from fedpeft.rpc.probe import Fault, PermanentFault
from fedpeft.rpc.timing import LONGEST_HOLD_S
from fedpeft.rpc.wire import CLIENT_KEY, INSTANCE_KEY, MESSAGE_LIMIT_BYTES, PROCESS_KEY
from fedpeft.v1 import access_service_pb2 as access_pb
from fedpeft.v1 import access_service_pb2_grpc as access_pb_grpc
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft_client.timing import TIMING, Timing
from fedpeft_client.uplink.training_progress import NONE, TrainingProgress
from fedpeft_client.uplink.wire_checks import check_answer

_OPTIONS: list[tuple[str, str | int]] = [
    NO_RETRIES,
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)
CallT = TypeVar("CallT", bound=grpc.aio.Call)


class _Unary(Protocol[RequestT, ResponseT]):
    def __call__(
        self, request: RequestT, /, *, timeout: float, metadata: grpc.aio.Metadata
    ) -> Awaitable[ResponseT]: ...


@dataclass(eq=False)
class Connection:
    """A connection and the number of calls in progress on it; an upload holds its own as one more."""

    channel: grpc.aio.Channel
    calls: int = 0

    def __post_init__(self) -> None:
        self.federation = pb_grpc.FederationServiceStub(self.channel)


Seen = Callable[[Message], None]
Sent = Callable[[Message | WrittenChunk], None]

_PUSH_UPDATE = "/fedpeft.v1.FederationService/PushUpdate"


def _unseen(_: Message | WrittenChunk) -> None:
    """Ignores a message."""


def _serialize(message: pb.PushUpdateRequest | WrittenChunk) -> bytes:
    return message.message if isinstance(message, WrittenChunk) else message.SerializeToString()


class Channel:
    """The server as this client sees it. Opened inside a running event loop.

    Every method raises the class of the error tree that the server raised, and `ServerUnreachable` if there was no
    answer.

    Args:
        server: HOST:PORT.
        name: The client's id.
        instance: Instance that holds the client id.
        identity: Its certificate and key; None for plain text.

    Attributes:
        sent: Called with every message before it is sent; whoever uses a stream calls it too.
        received: Called with every message that came, likewise.
        process: Names this process to the server, 32 hexadecimal digits.
    """

    def __init__(
        self, server: str, name: str, instance: str, identity: Identity | None = None, timing: Timing = TIMING
    ) -> None:
        self.timing = timing
        self._server = server
        self._identity = identity
        self._connection = Connection(open_channel(server, identity, _OPTIONS))
        self._leaving: set[asyncio.Task[None]] = set()
        self._old: list[Connection] = []
        self._cause: Fault | None = None
        self._explained_at: float | None = None
        self._hold_s = 0
        self.sent: Sent = _unseen
        self.received: Seen = _unseen
        self.process = process = secrets.token_hex(16)
        self._metadata = grpc.aio.Metadata((CLIENT_KEY, name), (INSTANCE_KEY, instance), (PROCESS_KEY, process))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection in (*self._old, self._connection):
            await connection.channel.close()
        await asyncio.gather(*self._leaving)

    def reopen(self, identity: Identity) -> None:
        """Makes every later call with another certificate; those under way go on as they are."""
        self._identity = identity
        old, self._connection = self._connection, Connection(open_channel(self._server, identity, _OPTIONS))
        self._old.append(old)
        self._tidy(old)

    async def leave(self, request: access_pb.LeaveRequest) -> access_pb.LeaveResponse:
        """Takes this client out for good."""
        return await self._call(access_pb_grpc.AccessServiceStub(self._connection.channel).Leave, request)

    async def register(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Announces the client."""
        return await self._call(self._connection.federation.Register, request)

    async def await_round(
        self, run: str, *, until_finished: bool, left_out: Iterable[str] = ()
    ) -> pb.AwaitRoundResponse:
        """Asks for work, not for that of some runs; the server holds the answer back for a while if there is none.

        Where many clients wait, its last answer says for how long; after a call that failed nothing is known of that.
        """
        hold_s, self._hold_s = self._hold_s, 0
        request = pb.AwaitRoundRequest(run=run, until_finished=until_finished, left_out=left_out, hold_s=hold_s)
        await_s = max(self.timing.await_s, self.timing.call_s + hold_s)
        answer = await self._call(self._connection.federation.AwaitRound, request, await_s)
        check_answer(answer, run)
        self._hold_s = min(answer.idle.hold_s, int(LONGEST_HOLD_S))
        return answer

    async def answer_offer(self, request: pb.AnswerOfferRequest) -> None:
        """Sends the answer to an offer: whether this client takes part in the run."""
        await self._call(self._connection.federation.AnswerOffer, request)

    async def check_runs(self, request: pb.CheckRunsRequest) -> pb.CheckRunsResponse:
        """Asks in which state runs are."""
        return await self._call(self._connection.federation.CheckRuns, request)

    async def get_upload(
        self, ticket: str, sha256: bytes, progress: TrainingProgress = NONE, on: Connection | None = None
    ) -> pb.GetUploadResponse:
        """Asks where an upload stands, and says how far the training is."""
        request = pb.GetUploadRequest(
            ticket=ticket,
            sha256=sha256,
            step=progress.step,
            steps=progress.steps,
            updates=progress.updates,
            updates_wanted=progress.wanted,
        )
        connection = on or self._connection
        return await self._call(connection.federation.GetUpload, request, connection=connection)

    async def withdraw(self, request: pb.WithdrawRequest) -> pb.WithdrawResponse:
        """Gives a ticket up."""
        return await self._call(self._connection.federation.Withdraw, request)

    async def push_evaluation(self, request: pb.PushEvaluationRequest) -> None:
        """Reports figures of a version."""
        await self._call(self._connection.federation.PushEvaluation, request)

    async def renew(self, request: access_pb.RenewRequest) -> access_pb.RenewResponse:
        """Asks for the next certificate, on a connection of its own: an upload on a slow line lets nothing past it."""
        async with open_channel(self._server, self._identity, _OPTIONS) as own:
            return await self._call(access_pb_grpc.AccessServiceStub(own).Renew, request)

    def pull_adapter(
        self, request: pb.PullAdapterRequest
    ) -> grpc.aio.UnaryStreamCall[pb.PullAdapterRequest, pb.PullAdapterResponse]:
        """Begins a download; what goes wrong with it is for `error`."""
        connection = self._connection
        return self._counted(connection.federation.PullAdapter(request, metadata=self._metadata), connection)

    @asynccontextmanager
    async def own_connection(self) -> AsyncIterator[Connection]:
        """Opens a connection for an upload and for the question where it stands; it ends with the block.

        Of several servers behind one name each knows of the bytes that came to itself alone. And what gRPC has read
        large messages into stays with a server's connection for as long as that is there.
        """
        own = Connection(open_channel(self._server, self._identity, _OPTIONS), calls=1)
        self._old.append(own)
        try:
            yield own
        finally:
            own.calls -= 1
            self._tidy(own)

    def push_update(
        self, on: Connection
    ) -> grpc.aio.StreamUnaryCall[pb.PushUpdateRequest | WrittenChunk, pb.PushUpdateResponse]:
        """Begins an upload; what goes wrong with it is for `error`."""
        push = on.channel.stream_unary(_PUSH_UPDATE, _serialize, pb.PushUpdateResponse.FromString)
        return self._counted(push(metadata=self._metadata), on)

    def error(self, error: grpc.aio.AioRpcError) -> FedpeftError:
        """Returns the error of the tree that a failed call stands for."""
        if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return ServerUnreachable(f"{self._server} did not answer in time")
        found = status.from_rpc_error(error)
        if isinstance(found, ServerUnreachable):
            return ServerUnreachable(f"{self._server} cannot be reached: {error.details()}")
        if isinstance(found, CertificateExpired) and self._identity and _is_valid(self._identity):
            self.reopen(self._identity)  # the connection is older than the certificate; or a clock is wrong, which
            return ServerUnreachable(found.message)  # the attempt to make another one will show
        return found

    async def _call(
        self,
        method: _Unary[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float | None = None,
        connection: Connection | None = None,
    ) -> ResponseT:
        self.sent(cast(Message, request))
        connection = connection or self._connection
        connection.calls += 1
        try:
            answer = await method(request, timeout=timeout_s or self.timing.call_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            fault = self.error(error)
            raise (await self._explained(fault) if isinstance(fault, ServerUnreachable) else fault) from error
        finally:
            connection.calls -= 1
            self._tidy(connection)
        self._explained_at = None
        self.received(cast(Message, answer))
        return answer

    def _counted(self, call: CallT, connection: Connection) -> CallT:
        """Lets a streaming call hold its connection until it is done."""
        connection.calls += 1

        def done(_: object) -> None:
            connection.calls -= 1
            self._tidy(connection)

        call.add_done_callback(done)
        return call

    def _tidy(self, connection: Connection) -> None:
        """Closes a connection that is out of use."""
        if connection in self._old and not connection.calls:
            self._old.remove(connection)
            task = asyncio.get_running_loop().create_task(connection.channel.close())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _explained(self, fault: ServerUnreachable) -> ServerUnreachable:
        """Returns the fault with its cause, as it was found the last time that it was looked for."""
        now = time.monotonic()
        if self._explained_at is None or now - self._explained_at > self.timing.explain_every_s:
            self._explained_at = now
            self._cause = await diagnosis.explain(self._server, Trust.of(self._identity) if self._identity else None)
        if self._cause is None:
            return fault
        found = ServerUnreachable(str(self._cause))
        found.permanent = isinstance(self._cause, PermanentFault)
        return found


def _is_valid(identity: Identity) -> bool:
    return datetime.now(UTC) < identity.certificate.not_valid_after_utc
