"""The typed client of OperatorService and AccessService, for the command line and for notebooks.

    async with OperatorClient("127.0.0.1:7070") as server:
        run = await server.create_run(config, spec, fingerprint, tensors, model_parameters)
        async for change in server.watch(run.id):
            print(change.run.version)

Answers are the protocol's own messages, and lists are whole: their pages are put together here. Notable: a creation is
repeated under one request id and a download goes on at the byte where it broke, so a server that restarts costs a
pause; and there is one patience for everything, the longest silence of the server that is waited out, so a transfer
that makes progress never ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc
from google.protobuf.message import Message

from fedpeft.api.access_calls import AccessCalls, RequestT, ResponseT, Unary
from fedpeft.api.relay_calls import AnswerT, Described, HeaderT, Progress, RelayCalls, Upload, silent
from fedpeft.api.round_parts import folded
from fedpeft.errors import (
    ChecksumMismatch,
    FedpeftError,
    IdentityInvalid,
    ServerUnreachable,
    StateInvalid,
    VersionNotFound,
)
from fedpeft.identity import certificates
from fedpeft.process import durable
from fedpeft.rpc import diagnosis, enrolment
from fedpeft.rpc.attempts import Attempts
from fedpeft.rpc.channel import open_channel
from fedpeft.rpc.diagnosis import Trust
from fedpeft.rpc.end_status import EndStatus
from fedpeft.rpc.probe import Closed
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import access_service_pb2_grpc, operator_service_pb2_grpc, run_pb2, tensor_pb2
from fedpeft.v1 import operator_service_pb2 as pb

if TYPE_CHECKING:
    from fedpeft.adapters.payload import Tensors
    from fedpeft.adapters.spec import AdapterSpec
    from fedpeft.config import RunConfig
    from fedpeft.identity.folder import Identity

RESPONSE_TIMEOUT_S = 60.0
"""Longest silence of the server that is waited out, in any call."""
LOOK_S = 5.0
"""Longest that a question takes where somebody looks at a screen; a list asks one question a page."""
ATTEMPTS = 4
"""Times a call is made before an unavailable server is given up."""
KEEP_S = 900.0
"""Life of one client, seconds: an identity is renewed, and one that was put in its place is read, when the next
is opened."""
RENEW_S = 10.0
"""Longest that a command waits for the next certificate, which it can do without for now."""
MAX_VERSION = 2**32 - 1
"""Highest version that a message can name."""
PAUSE_S = 0.25
"""Pause before the second attempt; doubled before each one after it."""

FINISHED = (run_pb2.RUN_STATE_COMPLETED, run_pb2.RUN_STATE_STOPPED)
"""The states that a run does not leave."""

T = TypeVar("T")


class OperatorClient(AccessCalls, RelayCalls):
    """A connection to a server's OperatorService and AccessService; an async context manager.

    Every call raises the class of `fedpeft.errors` that the server raised, or `ServerUnreachable`. An identity that is
    past half of its life is renewed, and written, when the connection is opened.

    Args:
        server: HOST:PORT.
        identity: Identity of the caller; None for plain text.
        attempts: Times a call is made before an unavailable server is given up.
        setting: Name of the setting that names the server, for errors.
        say: Called with a sentence where a call waits because the server asks to be called again.

    Attributes:
        timeout_s: Longest time for a call, its retries included; None: `RESPONSE_TIMEOUT_S` for each attempt. Transfers
            and watches use the default.
    """

    timeout_s: float | None = None

    def __init__(
        self,
        server: str,
        identity: Identity | None = None,
        *,
        attempts: int = ATTEMPTS,
        setting: str = "--server or FEDPEFT_SERVER",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._server, self._setting = server, setting
        self._attempts, self._say = attempts, say
        self._stale_at = time.monotonic() + KEEP_S
        self._open(identity)

    def _open(self, identity: Identity | None) -> None:
        self._identity = identity
        self._channel = open_channel(self._server, identity)
        self._stub = operator_service_pb2_grpc.OperatorServiceStub(self._channel)
        self._access = access_service_pb2_grpc.AccessServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        if self._identity and datetime.now(UTC) >= certificates.renewal(self._identity.certificate):
            await self._renew(self._identity)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connection; for one that was not entered, so that its identity is not renewed."""
        await self._channel.close()

    @property
    def is_stale(self) -> bool:
        """True if a caller that repeats its calls should open another client by now."""
        return time.monotonic() >= self._stale_at

    async def renew(self) -> Identity:
        """Renews the own certificate now, and takes up the authorities that the server wants trusted.

        Raises:
            IdentityInvalid: If the server is called in plain text.
        """
        if self._identity is None:
            raise IdentityInvalid("the server is called in plain text; there is no certificate to renew")
        renewed = await enrolment.renewed(self._identity, lambda request: self._ask(self._access.Renew, request))
        await self._channel.close()
        self._open(renewed)
        return renewed

    async def _renew(self, identity: Identity) -> None:
        """Gets the next certificate; one that cannot be had now is had the next time, as there is half a life left."""
        with suppress(FedpeftError, grpc.aio.AioRpcError, TimeoutError):
            async with asyncio.timeout(min(RENEW_S, self.timeout_s or RENEW_S)):
                renewed = await enrolment.renewed(identity, self._access.Renew)
            await self._channel.close()
            self._open(renewed)

    async def create_run(
        self,
        config: RunConfig,
        spec: AdapterSpec,
        fingerprint: str,
        tensors: Tensors,
        model_parameters: int,
        *,
        request_id: str | None = None,
        relays: pb.Relay | None = None,
        progress: Progress = silent,
    ) -> run_pb2.Run:
        """Uploads adapter version 0 with the run's configuration.

        Args:
            config: The run file.
            spec: Every tuned tensor.
            fingerprint: SHA-256 of the frozen tensors, 64 hexadecimal digits.
            tensors: Float32 by name, at least `spec.shared`.
            model_parameters: Parameters of the whole model.
            request_id: Makes a repetition safe; drawn if absent.
            relays: Run of a parent's server that this one works for; its version is the adapter. None: none.
            progress: Called after each chunk.

        Raises:
            InvalidArgument: If the server refuses the configuration, the spec or the payload.
        """
        # Here, so that commands that only ask need neither NumPy nor pydantic.
        from fedpeft.adapters import payload
        from fedpeft.rpc import wire

        manifest, data = payload.encode(tensors, spec.shared, "float32")
        header = pb.CreateRunHeader(
            config=wire.config_to_proto(config),
            spec=wire.spec_to_proto(spec),
            backbone_fingerprint=fingerprint,
            manifest=wire.manifest_to_proto(manifest),
            request_id=request_id or uuid.uuid4().hex,
            model_parameters=model_parameters,
            relays=relays,
        )
        return (await self._upload(self._stub.CreateRun, pb.CreateRunRequest, header, data, progress)).run

    async def run(self, run: str) -> tuple[run_pb2.Run, run_pb2.Round | None]:
        """Returns a run and its round in progress, that one without its tickets."""
        answer = await self._ask(self._stub.GetRun, pb.GetRunRequest(run=run))
        return answer.run, answer.round if answer.HasField("round") else None

    async def check(self) -> None:
        """Makes sure that the server answers, and lets the caller in; it costs the same however many runs there are."""
        await self._ask(self._stub.ListRuns, pb.ListRunsRequest(page_size=1))

    async def runs(self) -> list[run_pb2.Run]:
        """Returns all runs, oldest first."""
        return [run async for page in self._pages(self._stub.ListRuns, pb.ListRunsRequest()) for run in page.runs]

    async def rounds(self, run: str, after: int = 0, *, records: bool = True) -> list[run_pb2.Round]:
        """Returns the rounds of a run whose number is above `after`, by number, the one in progress included.

        Their records are most of the bytes where a round has very many clients; without `records` none is read or sent.
        """
        request = pb.ListRoundsRequest(run=run, after=min(after, MAX_VERSION), without_records=not records)
        parts = [part async for page in self._pages(self._stub.ListRounds, request) for part in page.rounds]
        return list(folded({}, parts).values())

    async def round(self, run: str, number: int) -> run_pb2.Round | None:
        """Returns one round of a run with its record and all its tickets, or None if there is no such round."""
        request = pb.ListRoundsRequest(run=run, after=number - 1, page_size=1)
        parts: list[run_pb2.Round] = []
        async for page in self._pages(self._stub.ListRounds, request):
            parts += page.rounds
            if any(part.number > number for part in page.rounds):
                break
        return folded({}, parts).get(number)

    async def watch(self, run: str, after: int = 0) -> AsyncIterator[pb.WatchRunResponse]:
        """Yields the run with the rounds above `after`, then what is new of them, until the run ends.

        What is new of a round is folded into what was known of it by `fedpeft.api.round_parts`. A server that has had
        nothing to say for `RESPONSE_TIMEOUT_S` is asked for the run, so a dead connection is found.

        Raises:
            ServerUnreachable: If the connection is lost; watch again on a new client.
        """
        call = self._stub.WatchRun(pb.WatchRunRequest(run=run, after=min(after, MAX_VERSION)))
        parts: list[run_pb2.Round] = []
        first = True
        try:
            while (message := await self._read(call, run, patient=not first)) is not None:
                first = False
                parts += message.rounds
                if message.more:
                    continue
                yield pb.WatchRunResponse(run=message.run, rounds=folded({}, parts).values())
                parts.clear()
                if message.run.state in FINISHED:
                    return
        finally:
            call.cancel()
        raise ServerUnreachable(f"the server at {self._server} ended the watch before the run ended")

    async def pause(self, run: str, reason: str = "") -> run_pb2.Run:
        """Lets no new round open; returns the run."""
        return (await self._ask(self._stub.PauseRun, pb.PauseRunRequest(run=run, reason=reason))).run

    async def resume(self, run: str) -> run_pb2.Run:
        """Lets rounds open again; returns the run."""
        return (await self._ask(self._stub.ResumeRun, pb.ResumeRunRequest(run=run))).run

    async def stop(self, run: str, reason: str = "") -> run_pb2.Run:
        """Ends a run for good; returns it."""
        return (await self._ask(self._stub.StopRun, pb.StopRunRequest(run=run, reason=reason))).run

    async def roll_back(self, run: str, version: int, reason: str = "") -> run_pb2.Run:
        """Takes a run back to an earlier version, as a new one; returns the run.

        Raises:
            VersionNotFound: If there is no such version.
        """
        if version > MAX_VERSION:
            raise VersionNotFound(f"{run} has no version {version}")
        request = pb.RollbackRunRequest(run=run, version=version, reason=reason)
        return (await self._ask(self._stub.RollbackRun, request)).run

    async def delete(self, run: str) -> None:
        """Removes a completed or stopped run with all its versions and records."""
        await self._ask(self._stub.DeleteRun, pb.DeleteRunRequest(run=run))

    async def clients(self) -> list[pb.Client]:
        """Returns every client that ever registered, by id."""
        pages = self._pages(self._stub.ListClients, pb.ListClientsRequest())
        return [client async for page in pages for client in page.clients]

    async def readmit(self, client: str, run: str = "") -> list[str]:
        """Lets a client back that was set aside, in one run or in all; returns the runs in which it was."""
        return list((await self._ask(self._stub.ReadmitClient, pb.ReadmitClientRequest(client=client, run=run))).runs)

    async def storage(self) -> pb.GetStorageResponse:
        """Returns the room on the server's disks, and what is stored there."""
        return await self._ask(self._stub.GetStorage, pb.GetStorageRequest())

    async def download(
        self, run: str, path: Path, *, version: int | None = None, progress: Progress = silent
    ) -> pb.DownloadHeader:
        """Writes an adapter version to `path` as the safetensors file that is stored; the newest if none is named.

        The file appears whole or not at all.

        Raises:
            ChecksumMismatch: If what came does not have the digest that the server recorded.
            StateInvalid: If the file cannot be written.
            VersionNotFound: If there is no such version.
        """
        if version is not None and version > MAX_VERSION:
            raise VersionNotFound(f"{run} has no version {version}")
        try:
            with durable.writing(path) as file:
                return await self._download_adapter(pb.DownloadAdapterRequest(run=run, version=version), file, progress)
        except OSError as error:
            raise StateInvalid(f"cannot write {path}: {error.strerror}") from None

    async def _download_adapter(
        self, request: pb.DownloadAdapterRequest, file: BufferedRandom, progress: Progress
    ) -> pb.DownloadHeader:
        def described(header: pb.DownloadHeader) -> Described:
            request.version = header.version  # a newer one must not be appended to this one
            return f"version {header.version} of {request.run}", header.size_bytes, header.sha256

        return await self._download(self._stub.DownloadAdapter, request, described, file, progress)

    async def _download(
        self,
        method: Callable[[Any], Any],
        request: Any,
        described: Callable[[HeaderT], Described],
        file: BufferedRandom,
        progress: Progress,
    ) -> HeaderT:
        """Fills `file` from where it ends, as often as it takes, and checks its digest.

        Args:
            method: The call.
            request: Its request; the offset is set here.
            described: Returns what is sent, how many bytes it has, and its digest.
            file: An empty file.
            progress: Called after each chunk.
        """

        async def attempt() -> HeaderT:
            request.offset = file.tell()
            call = method(request)
            try:
                header: HeaderT = (await self._expect(call)).header
                _, size_bytes, _ = described(header)
                while file.tell() < size_bytes:
                    await asyncio.to_thread(file.write, (await self._expect(call)).chunk.data)
                    progress(file.tell(), size_bytes)
                return header
            finally:
                call.cancel()

        header = await self._repeat(attempt, file.tell)
        what, _, sha256 = described(header)
        if await asyncio.to_thread(_settled, file) != sha256:
            raise ChecksumMismatch(f"{what} arrived with another sha256 than the server recorded; ask for it again")
        return header

    async def _upload(
        self,
        method: Upload[AnswerT],
        message: Callable[..., Any],
        header: Any,
        data: bytes,
        progress: Progress,
    ) -> AnswerT:
        """Sends a header and a payload in chunks, from the first byte as often as it takes."""

        async def messages(patience: asyncio.Timeout) -> AsyncIterator[Message]:
            for each, done in _messages(message, header, data):
                yield each
                progress(done, len(data))
                patience.reschedule(asyncio.get_running_loop().time() + RESPONSE_TIMEOUT_S)

        async def attempt() -> AnswerT:
            try:
                async with asyncio.timeout(RESPONSE_TIMEOUT_S) as patience:
                    call = method(messages(patience))
                    end = EndStatus(call)
                    answer: AnswerT = await call
                    return answer
            except TimeoutError:
                raise self._unreachable() from None
            except grpc.aio.AioRpcError as error:
                raise await end.error() from error

        return await self._repeat(attempt)

    async def _repeat(self, attempt: Callable[[], Awaitable[T]], moved: Callable[[], int] = lambda: 0) -> T:
        attempts = Attempts(self._attempts, PAUSE_S, self._error, self._explained, self._say)
        return await attempts.repeat(attempt, moved)

    async def _ask(self, method: Unary[RequestT, ResponseT], request: RequestT) -> ResponseT:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._repeat(lambda: method(request, timeout=RESPONSE_TIMEOUT_S))
        except TimeoutError:
            raise ServerUnreachable(
                f"no FedPEFT server answers at {self._server} within {self.timeout_s:g} s; it is not there, it "
                "hangs, or something on the path drops what is sent"
            ) from None

    async def _explained(self, cause: FedpeftError) -> FedpeftError:
        """Returns why there is no connection, if that is what is wrong."""
        if not isinstance(cause, ServerUnreachable):
            return cause
        found = await diagnosis.explain(self._server, Trust.of(self._identity) if self._identity else None)
        return cause if found is None or isinstance(found, Closed) else ServerUnreachable(str(found))

    def _error(self, error: grpc.aio.AioRpcError | FedpeftError) -> FedpeftError:
        """Returns the error of the tree; what gRPC itself says of a lost connection names the server."""
        if isinstance(error, FedpeftError):
            return error
        cause = from_rpc_error(error)
        if isinstance(cause, ServerUnreachable) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return self._unreachable()
        return cause

    def _unreachable(self) -> ServerUnreachable:
        text = f"no FedPEFT server answers at {self._server}; start fedpeft-server there, or name another with "
        return ServerUnreachable(text + self._setting)

    async def _within(self, step: Awaitable[T]) -> T:
        """Awaits one step of a transfer, and no longer than the server may be silent."""
        try:
            async with asyncio.timeout(RESPONSE_TIMEOUT_S):
                return await step
        except TimeoutError:
            raise self._unreachable() from None

    async def _expect(self, call: grpc.aio.UnaryStreamCall[Any, Any]) -> Any:
        """Returns the next message of a download."""
        message = await self._within(call.read())
        if not isinstance(message, Message):  # grpc.aio.EOF
            raise ServerUnreachable(f"the server at {self._server} ended the download before the file ended")
        return message

    async def _read(
        self, call: grpc.aio.UnaryStreamCall[pb.WatchRunRequest, pb.WatchRunResponse], run: str, *, patient: bool
    ) -> pb.WatchRunResponse | None:
        """Returns the next message, or None at the end of the stream; a patient one asks whether the server lives."""
        reading = asyncio.ensure_future(call.read())  # a task of its own: a read that is cancelled ends the call
        try:
            while not (await asyncio.wait({reading}, timeout=RESPONSE_TIMEOUT_S))[0]:
                if not patient:
                    raise self._unreachable()
                await self.run(run)
            message = reading.result()
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        finally:
            reading.cancel()
        return message if isinstance(message, pb.WatchRunResponse) else None  # grpc.aio.EOF


Connect = Callable[[], OperatorClient]
"""Makes a client of the server, a new one for every connection."""


def for_looking(connect: Connect) -> Connect:
    """Returns what makes clients that wait no longer than `LOOK_S` for an answer."""

    def made() -> OperatorClient:
        client = connect()
        client.timeout_s = LOOK_S
        return client

    return made


def _settled(file: BufferedRandom) -> bytes:
    """Forces a file to disk and returns its SHA-256: in a thread, for both take long where it is large."""
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    return hashlib.file_digest(file, "sha256").digest()


def _messages(message: Callable[..., Any], header: Message, data: bytes) -> Iterator[tuple[Message, int]]:
    """Yields the messages of an upload, each with the payload bytes sent once it is."""
    from fedpeft.adapters.payload import chunks  # here for the same reason

    yield message(header=header), 0
    for offset, length in chunks(0, len(data)):
        chunk = tensor_pb2.Chunk(offset=offset, data=data[offset : offset + length])
        yield message(chunk=chunk), offset + length
