"""A small OperatorService that keeps runs in memory and serves them over a real socket."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray
from safetensors.numpy import save

from fedpeft.adapters.adapter_file import ADAPTER, AdapterInfo
from fedpeft.errors import (
    ChecksumMismatch,
    Draining,
    FedpeftError,
    OffsetOutOfRange,
    RunFinished,
    RunNotFinished,
    RunNotFound,
    SumNotFound,
    VersionNotFound,
    VersionSuperseded,
)
from fedpeft.rpc.status import abort
from fedpeft.v1 import federation_service_pb2 as federation
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import operator_service_pb2_grpc, run_pb2, tensor_pb2

T = TypeVar("T")
START = 1_767_225_600  # 2026-01-01T00:00:00Z
CHUNK = 1000


def moment(seconds: float) -> Timestamp:
    return Timestamp(seconds=START + int(seconds), nanos=int(seconds % 1 * 1e9))


def adapter(run: run_pb2.Run, version: int, tensors: dict[str, NDArray[np.float32]]) -> bytes:
    """Returns the adapter file of a version, as a server keeps it."""
    info = AdapterInfo(run.id, version, run.config.peft.method, run.backbone_fingerprint, run.config.model.name, ("a",))
    return save(tensors, info.to_metadata(ADAPTER))


def a_run(run: str = "run-0123456789ab", **changes: Any) -> run_pb2.Run:
    """A bias run of three rounds of two clients, 60 of 1,000,000 parameters."""
    config = run_pb2.RunConfig(name="emoji")
    config.model.name = "vit_tiny"
    config.model.classes.extend(["cat", "dog"])
    config.peft.method = "bias"
    config.rounds.count, config.rounds.clients = 3, 2
    spec = tensor_pb2.AdapterSpec(method="bias")
    spec.tensors.add(name="head.bias", dtype="F32", shape=[10], roles=[tensor_pb2.ROLE_SENT])
    spec.tensors.add(name="head.weight", dtype="F32", shape=[5, 10], roles=[tensor_pb2.ROLE_SENT])
    fields: dict[str, Any] = {
        "state": run_pb2.RUN_STATE_RUNNING,
        "backbone_fingerprint": "ab" * 32,
        "created_at": moment(0),
        "model_parameters": 1_000_000,
    }
    return run_pb2.Run(id=run, config=config, spec=spec, **(fields | changes))


def a_ticket(client: str, state: run_pb2.TicketState.ValueType, number: int) -> run_pb2.Ticket:
    ticket = run_pb2.Ticket(id=f"ticket-{number:02}{client}", client=client, state=state)
    if state == run_pb2.TICKET_STATE_RECEIVED:
        ticket.examples, ticket.weight, ticket.update_norm = 64, 0.5, 1.25
        ticket.payload_sha256 = "cd" * 32
        ticket.wire_bytes_up, ticket.wire_bytes_down = 300, 310
        ticket.payload_bytes_up, ticket.payload_bytes_down = 240, 240
        ticket.metrics["loss"] = 2.5
    return ticket


def a_round(number: int, *, committed: bool = True, accuracy: float | None = None) -> run_pb2.Round:
    """Round `number` of clients `noto` and `twemoji`; still open it has an update of the first only."""
    received, issued = run_pb2.TICKET_STATE_RECEIVED, run_pb2.TICKET_STATE_ISSUED
    tickets = [a_ticket("noto", received, number), a_ticket("twemoji", received if committed else issued, number)]
    answer = run_pb2.Round(
        number=number,
        base_version=number - 1,
        phase=run_pb2.ROUND_PHASE_COMMITTED if committed else run_pb2.ROUND_PHASE_OPEN,
        opened_at=moment(10 * number),
        deadline=moment(10 * number + 600),
        tickets=tickets,
    )
    for name in ("wire_bytes_up", "wire_bytes_down", "payload_bytes_up", "payload_bytes_down"):
        setattr(answer, name, sum(getattr(t, name) for t in tickets))
    if committed:
        answer.committed_at.CopyFrom(moment(10 * number + 4.5))
        answer.metrics["train_loss"] = 2.5
        answer.record, answer.record_sha256 = "{}", "ef" * 32
    if accuracy is not None:
        answer.metrics["accuracy"], answer.metrics["loss"] = accuracy, 1.5
    return answer


class Double(operator_service_pb2_grpc.OperatorServiceServicer):
    """Answers from `runs` and `rounds`, which a test sets; notes what was asked."""

    def __init__(self) -> None:
        self.runs: dict[str, run_pb2.Run] = {}
        self.rounds: dict[str, list[run_pb2.Round]] = {}
        self.clients: list[pb.Client] = []
        self.files: dict[tuple[str, int], bytes] = {}
        self.script: list[pb.WatchRunResponse | FedpeftError | float] = []
        """Script of the watches, over all of them; an error ends the one it meets, a number is seconds of silence."""
        self.failures: dict[str, list[FedpeftError]] = {}
        """Errors that calls of a name end with, one each, before they answer."""
        self.created: dict[str, tuple[pb.CreateRunHeader, bytes]] = {}
        """Accepted uploads by request id."""
        self.supplied: list[tuple[pb.SupplyVersionHeader, bytes]] = []
        self.sums: dict[tuple[str, int], tuple[pb.DownloadSumHeader, bytes]] = {}
        self.asked: list[str] = []
        self.asked_after: list[int] = []
        """Numbers after which rounds were asked for."""
        self.break_download_after: list[int] = []
        """Bytes after which a download ends, one download each."""
        self.break_with: FedpeftError = Draining("the server is shutting down")
        self.corrupt = False
        self.page = 100
        """Most items of a page; in a list of rounds, most tickets."""

    async def _enter(self, name: str, context: Any) -> None:
        self.asked.append(name)
        if self.failures.get(name):
            await abort(context, self.failures[name].pop(0), names_places=True)

    async def _find(self, run: str, context: Any) -> run_pb2.Run:
        if run not in self.runs:
            await abort(context, RunNotFound(f"there is no run {run}"), names_places=True)
        return self.runs[run]

    async def CreateRun(
        self, request_iterator: AsyncIterator[pb.CreateRunRequest], context: Any
    ) -> pb.CreateRunResponse:
        await self._enter("CreateRun", context)
        header, data = await self._uploaded(request_iterator, context)
        if header.request_id not in self.created:
            self.created[header.request_id] = (header, data)
            name = header.relays.run or f"run-{len(self.created):012}"
            run = a_run(name, model_parameters=header.model_parameters, version=header.relays.version)
            run.config.CopyFrom(header.config)
            run.spec.CopyFrom(header.spec)
            run.backbone_fingerprint = header.backbone_fingerprint
            self.runs[run.id] = run
        return pb.CreateRunResponse(run=list(self.runs.values())[-1])

    async def _uploaded(self, requests: AsyncIterator[Any], context: Any) -> tuple[Any, bytes]:
        data, header = b"", None
        async for request in requests:
            if request.HasField("header"):
                header = request.header
                continue
            assert request.chunk.offset == len(data)
            data += request.chunk.data
        assert header is not None
        if hashlib.sha256(data).digest() != header.manifest.sha256:
            await abort(context, ChecksumMismatch("the payload does not have the manifest's digest"), names_places=True)
        return header, data

    async def SupplyVersion(
        self, request_iterator: AsyncIterator[pb.SupplyVersionRequest], context: Any
    ) -> pb.SupplyVersionResponse:
        await self._enter("SupplyVersion", context)
        header, data = await self._uploaded(request_iterator, context)
        run = await self._find(header.run, context)
        if header.version < run.version:
            await abort(context, VersionSuperseded(f"{run.id} has version {run.version} by now"), names_places=True)
        self.supplied.append((header, data))
        run.version = header.version
        if run.version >= run.config.rounds.count:
            run.state = run_pb2.RUN_STATE_COMPLETED
        return pb.SupplyVersionResponse(run=run)

    async def DownloadSum(self, request: pb.DownloadSumRequest, context: Any) -> AsyncIterator[pb.DownloadSumResponse]:
        await self._enter("DownloadSum", context)
        if (request.run, request.round) not in self.sums:
            await abort(context, SumNotFound(f"{request.run} has no sum of round {request.round}"), names_places=True)
        header, data = self.sums[request.run, request.round]
        yield pb.DownloadSumResponse(header=header)
        async for chunk in self._chunks(data, request.offset, context):
            yield pb.DownloadSumResponse(chunk=chunk)

    async def _chunks(self, data: bytes, offset: int, context: Any) -> AsyncIterator[tensor_pb2.Chunk]:
        limit = self.break_download_after.pop(0) if self.break_download_after else len(data)
        for start in range(offset, len(data), CHUNK):
            if start >= limit:
                await abort(context, self.break_with, names_places=True)
            yield tensor_pb2.Chunk(offset=start, data=data[start : start + CHUNK])

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        await self._enter("GetRun", context)
        run = await self._find(request.run, context)
        current = [r for r in self.rounds.get(run.id, []) if r.phase != run_pb2.ROUND_PHASE_COMMITTED]
        return pb.GetRunResponse(run=run, round=current[0] if current else None)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        await self._enter("ListRuns", context)
        runs, token = self._page(list(self.runs.values()), request.page_token, request.page_size)
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Any) -> pb.ListRoundsResponse:
        await self._enter("ListRounds", context)
        self.asked_after.append(request.after)
        run = await self._find(request.run, context)
        rounds = [r for r in self.rounds.get(run.id, []) if r.number > request.after]
        if self.page >= sum(len(r.tickets) for r in rounds):
            return pb.ListRoundsResponse(rounds=rounds)
        single = []
        for r in rounds:
            for i, ticket in enumerate(r.tickets):
                part = run_pb2.Round()
                part.CopyFrom(r)
                del part.tickets[:]
                part.tickets.append(ticket)
                part.record = r.record if not i else ""
                single.append(part)
        parts, token = self._page(single, request.page_token, 1)
        return pb.ListRoundsResponse(rounds=parts, next_page_token=token)

    def _page(self, items: list[T], token: str, most: int = 0) -> tuple[list[T], str]:
        start, end = int(token or 0), int(token or 0) + (most or self.page)
        return items[start:end], str(end) if end < len(items) else ""

    async def WatchRun(self, request: pb.WatchRunRequest, context: Any) -> AsyncIterator[pb.WatchRunResponse]:
        await self._enter("WatchRun", context)
        await self._find(request.run, context)
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, FedpeftError):
                await abort(context, step, names_places=True)
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step

    async def PauseRun(self, request: pb.PauseRunRequest, context: Any) -> pb.PauseRunResponse:
        run = await self._steer(request.run, run_pb2.RUN_STATE_PAUSED, request.reason, context)
        return pb.PauseRunResponse(run=run)

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Any) -> pb.ResumeRunResponse:
        run = await self._steer(request.run, run_pb2.RUN_STATE_RUNNING, "", context)
        return pb.ResumeRunResponse(run=run)

    async def StopRun(self, request: pb.StopRunRequest, context: Any) -> pb.StopRunResponse:
        run = await self._steer(request.run, run_pb2.RUN_STATE_STOPPED, request.reason, context)
        return pb.StopRunResponse(run=run)

    async def _steer(self, run: str, state: run_pb2.RunState.ValueType, reason: str, context: Any) -> run_pb2.Run:
        found = await self._find(run, context)
        if found.state == run_pb2.RUN_STATE_COMPLETED:
            await abort(context, RunFinished(f"{run} is completed"), names_places=True)
        found.state, found.reason = state, reason
        return found

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Any) -> pb.DeleteRunResponse:
        run = await self._find(request.run, context)
        if run.state not in (run_pb2.RUN_STATE_COMPLETED, run_pb2.RUN_STATE_STOPPED):
            await abort(context, RunNotFinished(f"{run.id} is running; stop it first"), names_places=True)
        del self.runs[run.id]
        return pb.DeleteRunResponse()

    async def DownloadAdapter(
        self, request: pb.DownloadAdapterRequest, context: Any
    ) -> AsyncIterator[pb.DownloadAdapterResponse]:
        await self._enter("DownloadAdapter", context)
        run = await self._find(request.run, context)
        version = request.version if request.HasField("version") else run.version
        if (run.id, version) not in self.files:
            await abort(context, VersionNotFound(f"{run.id} has no version {version}"), names_places=True)
        data = self.files[run.id, version]
        if request.offset > len(data):
            await abort(context, OffsetOutOfRange(f"the file has {len(data)} bytes"), names_places=True)
        digest = hashlib.sha256(data + b"x" * self.corrupt).digest()
        header = pb.DownloadHeader(version=version, size_bytes=len(data), sha256=digest)
        yield pb.DownloadAdapterResponse(header=header)
        async for chunk in self._chunks(data, request.offset, context):
            yield pb.DownloadAdapterResponse(chunk=chunk)

    async def ListClients(self, request: pb.ListClientsRequest, context: Any) -> pb.ListClientsResponse:
        await self._enter("ListClients", context)
        clients, token = self._page(self.clients, request.page_token)
        return pb.ListClientsResponse(clients=clients, next_page_token=token)


def a_client(name: str, role: federation.ClientRole.ValueType, activity: str = "waiting") -> pb.Client:
    capabilities = federation.Capabilities(software="fedpeft 0.1.0", device="cpu", examples=640)
    return pb.Client(
        id=name,
        role=role,
        capabilities=capabilities,
        first_seen=moment(1),
        last_seen=moment(61.5),
        activity=activity,
        updates=3,
    )


class Serving:
    """A double behind a port of the loopback interface, on an event loop in a thread of its own."""

    def __init__(self, double: Double) -> None:
        self.double = double
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server: grpc.aio.Server | None = None

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def start(self) -> None:
        """Begins to listen; on the same port as before if there was one."""

        async def listen() -> None:
            self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(self.double, self._server)
            port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
            await self._server.start()
            self.address = f"127.0.0.1:{port}"

        self._do(listen())

    def stop(self) -> None:
        """Stops listening and breaks every call."""
        server, self._server = self._server, None
        if server is not None:
            self._do(server.stop(None))

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@contextmanager
def serving(double: Double) -> Iterator[Serving]:
    served = Serving(double)
    try:
        served.start()
        yield served
    finally:
        served.close()
