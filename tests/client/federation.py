"""A federation server in memory, over real sockets: what the contract says, and faults on demand.

One run at a time is enough for a client's tests: a round opens when enough clients wait, closes when no ticket is open,
and its result is the plain mean of what was received.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.protobuf.message import Message

from fedpeft import seeds
from fedpeft.adapters import payload
from fedpeft.adapters.payload import CHUNK_BYTES, Manifest
from fedpeft.adapters.spec import AdapterSpec
from fedpeft.config import RunConfig, TrainingConfig
from fedpeft.errors import (
    ClientIdInUse,
    ClientIdInvalid,
    FedpeftError,
    NotRegistered,
    OffsetOutOfRange,
    RoundClosed,
    RunNotFound,
    TicketClosed,
    TicketNotFound,
    TicketOfAnother,
    UpdateDiffers,
    UploadIncomplete,
    VersionNotFound,
)
from fedpeft.rpc import status, wire
from fedpeft.rpc.wire import CLIENT_KEY, INSTANCE_KEY, TURN_KEY
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.v1 import run_pb2, tensor_pb2

HOLD_S = 0.5
Context = grpc.aio.ServicerContext


@dataclass
class FakeTicket:
    id: str
    client: str
    number: int
    state: int = run_pb2.TICKET_STATE_ISSUED
    held: bytearray = field(default_factory=bytearray)
    held_sha256: bytes = b""
    header: pb.UpdateHeader | None = None
    receipt: pb.PushUpdateResponse | None = None
    reason: str = ""


@dataclass
class Push:
    """One PushUpdate stream as the server saw it."""

    ticket: str
    sha256: str
    offset: int | None = None
    received: int = 0
    error: str = ""


class Arrivals(grpc.aio.ServerInterceptor):
    """Counts every message that comes, as it comes."""

    def __init__(self) -> None:
        self.wire_bytes = 0
        self.messages: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)

        def arrived(data: bytes) -> Message:
            message: Message = handler.request_deserializer(data)
            self.wire_bytes += len(data)
            self.messages[type(message).__name__] += 1
            return message

        return handler._replace(request_deserializer=arrived)


class FakeRun:
    def __init__(self, config: RunConfig, spec: AdapterSpec, fingerprint: str, adapter: payload.Tensors) -> None:
        self.id = "run-000000000001"
        self.config, self.spec, self.fingerprint = config, spec, fingerprint
        self.versions: list[dict[str, np.ndarray]] = [dict(adapter)]
        self.tickets: dict[str, FakeTicket] = {}
        self.number = 0
        self.evaluations: dict[int, dict[str, float]] = {}
        self.failures: dict[int, str] = {}

    @property
    def finished(self) -> bool:
        return len(self.versions) > self.config.rounds.count

    def message(self) -> run_pb2.Run:
        state = run_pb2.RUN_STATE_COMPLETED if self.finished else run_pb2.RUN_STATE_RUNNING
        return run_pb2.Run(
            id=self.id,
            config=wire.config_to_proto(self.config),
            spec=wire.spec_to_proto(self.spec),
            backbone_fingerprint=self.fingerprint,
            state=state,
            version=len(self.versions) - 1,
        )

    def encoded(self, version: int) -> tuple[Manifest, bytes]:
        if version >= len(self.versions):
            raise VersionNotFound(f"run {self.id} has no version {version}")
        return payload.encode(self.versions[version], self.spec.shared, self.config.codec.down)

    def open_tickets(self) -> list[FakeTicket]:
        return [t for t in self.tickets.values() if t.state == run_pb2.TICKET_STATE_ISSUED]

    def advance(self) -> None:
        """Closes the round if no ticket is open."""
        mine = [t for t in self.tickets.values() if t.number == self.number]
        received = [t for t in mine if t.state == run_pb2.TICKET_STATE_RECEIVED]
        if len(self.versions) != self.number or self.open_tickets() or not received:
            return
        new = {name: array.copy() for name, array in self.versions[-1].items()}
        for ticket in sorted(received, key=lambda t: t.client):
            assert ticket.header is not None
            manifest = wire.manifest_from_proto(ticket.header.manifest)
            payload.check_manifest(manifest, self.spec.sent(self.number), [self.config.codec.encoding])
            payload.check_payload(manifest, memoryview(ticket.held))
            for name, delta in payload.decode(manifest, memoryview(ticket.held)).items():
                new[name] += delta / len(received)
        self.versions.append(new)


class Federation(pb_grpc.FederationServiceServicer):
    """The server. Faults are attributes that the test sets; each is used up when it happens."""

    def __init__(self, run: FakeRun | None) -> None:
        self.run = run
        self.waiting: set[str] = set()
        self.instances: dict[str, str] = {}
        self.registered: dict[str, pb.RegisterRequest] = {}
        self.registrations = 0
        self.awaited: list[float] = []
        self.pulled: list[tuple[int, int, bool]] = []
        self.pulled_bytes: list[int] = []
        """Bytes that each pull would bring if it were not interrupted."""
        self.on_pull: Callable[[pb.PullAdapterRequest], None] = lambda request: None
        self.sends_parts = True
        """False as a server is that knows of no `have_version`."""
        self.pushes: list[Push] = []
        self.withdrawn: list[FakeTicket] = []
        self.answers: dict[tuple[str, str], pb.AnswerOfferRequest] = {}
        self.declines: list[tuple[str, str, list[str]]] = []
        self.others: list[FakeRun] = []
        self.break_push_after: list[int] = []
        self.break_pull_after: list[int] = []
        self.stall_push_after: list[int] = []
        self.close_round_after = 0
        self.refuse_register: list[FedpeftError] = []
        self.refuse_push: list[FedpeftError] = []
        self.fail: dict[str, list[FedpeftError]] = {}
        """By method, what its calls are answered with before they are looked at."""
        self.left_out: list[list[str]] = []
        """The runs that were left out of each call for work."""
        self.receive_but_do_not_answer = 0
        self.hang_before_turn = 0
        self.chunk_pause_s = 0.0
        self.ask_for: TrainingConfig | None = None
        """Settings that tickets ask for, in place of those that the run was offered with."""
        self.unavailable = 0
        """Number of calls, of any kind, that are answered with UNAVAILABLE once they have come."""
        self.arrivals = Arrivals()
        self.port = 0
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        self._server = grpc.aio.server(interceptors=[self.arrivals], options=[("grpc.so_reuseport", 0)])
        pb_grpc.add_FederationServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        client = await self._caller(context)
        if self.refuse_register:
            await status.abort(context, self.refuse_register.pop(0))
        self.registrations += 1
        if request.run and request.run not in [run.id for run in self.runs]:
            await status.abort(context, RunNotFound(f"there is no run {request.run}"))
        if not request.dry_run:
            self.registered[client] = request
            self.answers = {key: given for key, given in self.answers.items() if key[0] != client}
        shown = [run.message() for run in self.runs if request.run in ("", run.id) and not run.finished]
        if not request.dry_run:
            return pb.RegisterResponse(protocol=1, runs=shown)
        at = int(request.page_token or 0)  # a page is one run
        more = str(at + 1) if at + 1 < len(shown) else ""
        return pb.RegisterResponse(protocol=1, runs=shown[at : at + 1], next_page_token=more)

    async def AwaitRound(self, request: pb.AwaitRoundRequest, context: Context) -> pb.AwaitRoundResponse:
        client = await self._caller(context, registered=True)
        if request.run and request.run not in [run.id for run in self.runs]:
            await status.abort(context, RunNotFound(f"there is no run {request.run}"))
        self.left_out.append(list(request.left_out))
        for run in self.runs:
            if run.id in request.left_out:
                continue
            if (client, run.id) not in self.answers and request.run in ("", run.id) and self._open(client, run):
                return pb.AwaitRoundResponse(offer=pb.RunOffer(run=run.message()))
        loop = asyncio.get_running_loop()
        self.awaited.append(loop.time())
        self.waiting.add(client)
        end = loop.time() + HOLD_S
        try:
            while loop.time() < end:
                if (answer := self._task(client, request.left_out)) is not None:
                    return answer
                await asyncio.sleep(0.01)
        finally:
            self.waiting.discard(client)
        finished = all(run.finished or not self._accepted(client, run) for run in self.runs)
        return pb.AwaitRoundResponse(idle=pb.Idle(reason="waiting for clients", finished=finished))

    @property
    def runs(self) -> list[FakeRun]:
        """The run that is held, and before it those that are only offered."""
        return [*self.others, *([self.run] if self.run else [])]

    def _open(self, client: str, run: FakeRun) -> bool:
        judges = self.registered[client].role == pb.CLIENT_ROLE_EVALUATOR
        return len(run.evaluations) < len(run.versions) if judges else not run.finished

    def _accepted(self, client: str, run: FakeRun) -> bool:
        given = self.answers.get((client, run.id))
        return given is not None and given.answer == pb.ANSWER_ACCEPTED

    async def AnswerOffer(self, request: pb.AnswerOfferRequest, context: Context) -> pb.AnswerOfferResponse:
        client = await self._caller(context, registered=True)
        await self._fail("AnswerOffer", context)
        if request.run not in [run.id for run in self.runs]:
            await status.abort(context, RunNotFound(f"there is no run {request.run}"))
        self.answers[client, request.run] = request
        if request.answer != pb.ANSWER_ACCEPTED:
            self.declines.append((client, request.run, list(request.reasons)))
            for ticket in self.run.open_tickets() if self.run else ():
                if ticket.client == client:
                    ticket.state, ticket.reason = run_pb2.TICKET_STATE_WITHDRAWN, "; ".join(request.reasons)
        return pb.AnswerOfferResponse()

    def _task(self, client: str, left_out: Container[str]) -> pb.AwaitRoundResponse | None:
        run = self.run
        if run is None or run.id in left_out or not self._accepted(client, run):
            return None
        if self.registered[client].role == pb.CLIENT_ROLE_EVALUATOR:
            missing = [v for v in range(len(run.versions)) if v not in run.evaluations]
            task = pb.EvaluationTask(run=run.id, version=missing[0]) if missing else None
            return pb.AwaitRoundResponse(evaluation=task) if task else None
        roles, trainer = self.registered, pb.CLIENT_ROLE_TRAINER
        trainers = [c for c in self.waiting if roles[c].role == trainer and self._accepted(c, run)]
        if not run.open_tickets() and not run.finished and len(trainers) >= run.config.rounds.clients:
            run.number = len(run.versions)
            for each in sorted(trainers):
                ticket = FakeTicket(f"ticket-{run.number:08d}-{len(run.tickets):07d}", each, run.number)
                run.tickets[ticket.id] = ticket
        for ticket in run.open_tickets():
            if ticket.client == client:
                return pb.AwaitRoundResponse(training=self._training(run, ticket))
        return None

    def _training(self, run: FakeRun, ticket: FakeTicket) -> pb.TrainingTask:
        return pb.TrainingTask(
            ticket=ticket.id,
            run=run.id,
            round=ticket.number,
            version=ticket.number - 1,
            seed=seeds.training(run.config.rounds.seed, ticket.number, ticket.client),
            settings=wire.training_to_proto(self.ask_for or run.config.training),
        )

    async def PullAdapter(
        self, request: pb.PullAdapterRequest, context: Context
    ) -> AsyncIterator[pb.PullAdapterResponse]:
        await self._caller(context)
        await self._fail("PullAdapter", context)
        self.on_pull(request)
        assert self.run is not None
        try:
            manifest, data = self.run.encoded(request.version)
        except FedpeftError as error:
            await status.abort(context, error)
        held = request.have_sha256 == manifest.sha256
        self.pulled.append((request.version, request.offset, held))
        header = pb.PullHeader(version=request.version, manifest=wire.manifest_to_proto(manifest), up_to_date=held)
        if self.sends_parts and request.HasField("have_version"):
            needed = payload.missing(manifest, self.run.spec, request.version, request.have_version)
            if len(needed) < len(manifest.entries):
                header.tensors.extend(needed)
                entries = [entry for i, entry in enumerate(manifest.entries) if i in needed]
                data = b"".join(data[entry.offset : entry.offset + entry.length] for entry in entries)
        self.pulled_bytes.append(0 if held else len(data) - request.offset)
        if request.offset > len(data):
            await status.abort(context, OffsetOutOfRange(f"the payload has {len(data)} bytes"))
        yield pb.PullAdapterResponse(header=header)
        limit = self.break_pull_after.pop(0) if self.break_pull_after else None
        size = CHUNK_BYTES if limit is None else max(1, limit // 3)
        for start in range(request.offset, 0 if held else len(data), size):
            if limit is not None and start >= limit:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable was pulled")
            chunk = tensor_pb2.Chunk(offset=start, data=data[start : start + size])
            yield pb.PullAdapterResponse(chunk=chunk)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        ticket = await self._ticket(request.ticket, context)
        held = len(ticket.held) if ticket.held_sha256 == request.sha256 else 0
        return pb.GetUploadResponse(
            committed_bytes=held, state=ticket.state, receipt=ticket.receipt, reason=ticket.reason
        )

    async def PushUpdate(
        self, requests: AsyncIterator[pb.PushUpdateRequest], context: Context
    ) -> pb.PushUpdateResponse:
        first = await anext(requests)
        assert first.WhichOneof("part") == "header"
        ticket = await self._ticket(first.header.ticket, context)
        push = Push(ticket.id, first.header.manifest.sha256.hex())
        self.pushes.append(push)
        try:
            return await self._receive(ticket, first.header, requests, push, context)
        except FedpeftError as error:
            push.error = error.reason
            await status.abort(context, error)

    async def _receive(
        self,
        ticket: FakeTicket,
        header: pb.UpdateHeader,
        requests: AsyncIterator[pb.PushUpdateRequest],
        push: Push,
        context: Context,
    ) -> pb.PushUpdateResponse:
        if self.hang_before_turn:
            self.hang_before_turn -= 1
            await context.send_initial_metadata((("not-a-turn", "1"),))
            await asyncio.sleep(3600)
        if self.refuse_push:
            error = self.refuse_push.pop(0)
            ticket.state = _CLOSES.get(type(error).__name__, ticket.state)
            raise error
        if ticket.receipt is not None:
            if ticket.receipt.sha256 != header.manifest.sha256:
                raise UpdateDiffers("another update was received")
            return ticket.receipt
        if ticket.state != run_pb2.TICKET_STATE_ISSUED:
            raise RoundClosed("too late") if ticket.state == run_pb2.TICKET_STATE_LATE else TicketClosed("closed")
        if ticket.held_sha256 != header.manifest.sha256:
            ticket.held, ticket.held_sha256 = bytearray(), header.manifest.sha256
        await context.send_initial_metadata(((TURN_KEY, "1"),))  # it is this upload's turn
        limit = self.break_push_after.pop(0) if self.break_push_after else None
        async for message in requests:
            await self._take(ticket, message.chunk, push, limit, context)
        if len(ticket.held) < header.manifest.payload_bytes:
            raise UploadIncomplete(f"ended at byte {len(ticket.held)}")
        assert hashlib.sha256(ticket.held).digest() == header.manifest.sha256
        ticket.header, ticket.state = header, run_pb2.TICKET_STATE_RECEIVED
        ticket.receipt = pb.PushUpdateResponse(ticket=ticket.id, sha256=header.manifest.sha256)
        assert self.run is not None
        self.run.advance()
        if self.receive_but_do_not_answer:
            self.receive_but_do_not_answer -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        return ticket.receipt

    async def _take(
        self, ticket: FakeTicket, chunk: tensor_pb2.Chunk, push: Push, limit: int | None, context: Context
    ) -> None:
        if push.offset is None:
            push.offset = chunk.offset
            if chunk.offset == 0:
                ticket.held.clear()
        if chunk.offset != len(ticket.held):
            raise OffsetOutOfRange(f"byte {chunk.offset} came, {len(ticket.held)} is next")
        data = chunk.data if limit is None else chunk.data[: limit - push.received]
        ticket.held += data
        push.received += len(data)
        if limit is not None and push.received >= limit:
            push.error = "broken"
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable was pulled")
        if self.close_round_after and push.received >= self.close_round_after:
            ticket.state = run_pb2.TICKET_STATE_LATE
            raise RoundClosed("the round closed during the upload")
        if self.stall_push_after and push.received >= self.stall_push_after[0]:
            await asyncio.sleep(3600)
        await asyncio.sleep(self.chunk_pause_s)

    async def Withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawResponse:
        await self._fail("Withdraw", context)
        ticket = await self._ticket(request.ticket, context)
        if ticket.state == run_pb2.TICKET_STATE_ISSUED:
            ticket.state, ticket.reason = run_pb2.TICKET_STATE_WITHDRAWN, request.reason
            self.withdrawn.append(ticket)
        return pb.WithdrawResponse(state=ticket.state)

    async def PushEvaluation(self, request: pb.PushEvaluationRequest, context: Context) -> pb.PushEvaluationResponse:
        await self._caller(context)
        await self._fail("PushEvaluation", context)
        assert self.run is not None
        self.run.evaluations[request.version] = dict(request.metrics)
        if request.failure:
            self.run.failures[request.version] = request.failure
        return pb.PushEvaluationResponse()

    async def _fail(self, method: str, context: Context) -> None:
        if self.fail.get(method):
            await status.abort(context, self.fail[method].pop(0))

    async def _caller(self, context: Context, registered: bool = False) -> str:
        if self.unavailable:
            self.unavailable -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the cable was pulled")
        metadata = dict(context.invocation_metadata() or ())
        client, instance = str(metadata.get(CLIENT_KEY, "")), str(metadata.get(INSTANCE_KEY, ""))
        if not client or len(instance) != 32:
            await status.abort(context, ClientIdInvalid("who calls?"))
        if self.instances.setdefault(client, instance) != instance:
            await status.abort(context, ClientIdInUse(f"another live instance holds the id {client}"))
        if registered and client not in self.registered:
            await status.abort(context, NotRegistered("Register first"))
        return client

    async def _ticket(self, ticket: str, context: Context) -> FakeTicket:
        client = await self._caller(context)
        found = self.run.tickets.get(ticket) if self.run else None
        if found is None:
            await status.abort(context, TicketNotFound(f"there is no ticket {ticket}"))
        if found.client != client:
            await status.abort(context, TicketOfAnother(f"ticket {ticket} was given to another client"))
        return found


_CLOSES = {
    "RoundClosed": run_pb2.TICKET_STATE_LATE,
    "PayloadInvalid": run_pb2.TICKET_STATE_REFUSED,
}
