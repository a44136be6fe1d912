"""OperatorService: what operators and researchers call. The semantics are in `operator_service.proto`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from functools import partial

from fedpeft.adapters.payload import chunks
from fedpeft.errors import (
    ClientNotFound,
    OffsetOutOfRange,
    RequestIdReused,
    RunNotFound,
)
from fedpeft.rounds.state_machine import Round
from fedpeft.rpc import chunk_messages
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import operator_service_pb2_grpc as pb_grpc
from fedpeft.v1 import run_pb2
from fedpeft_server.access import untrusted_text
from fedpeft_server.access.call import actor
from fedpeft_server.rpc import pages
from fedpeft_server.rpc.history import History
from fedpeft_server.rpc.messages import (
    AWAITED,
    EVALUATORS,
    client_message,
    disk_message,
    progress_message,
    run_message,
    scoring_message,
)
from fedpeft_server.rpc.new_runs import new_run, stored_version
from fedpeft_server.rpc.relaying import Relaying
from fedpeft_server.rpc.sessions import Sessions
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.runs import Runs
from fedpeft_server.runs.waiting import withdrawn
from fedpeft_server.store.blobs.integrity import Kind
from fedpeft_server.store.rows import ClientRow, Place, RunRow
from fedpeft_server.store.store import NewVersion, Store, file_key
from fedpeft_server.timing import Timing
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.uploads.incoming import Context, first_header
from fedpeft_server.uploads.pipeline import Uploads

FINISHED = (run_pb2.RUN_STATE_COMPLETED, run_pb2.RUN_STATE_STOPPED)


class Operator(pb_grpc.OperatorServiceServicer):
    """The service of the operators."""

    def __init__(
        self,
        runs: Runs,
        store: Store,
        sessions: Sessions,
        uploads: Uploads,
        byte_counter: ByteCounter,
        timing: Timing,
    ) -> None:
        self._runs = runs
        self._store = store
        self._sessions = sessions
        self._uploads = uploads
        self._timing = timing
        self._history = History(store, byte_counter)
        self._relaying = Relaying(runs, store, uploads)

    async def CreateRun(
        self, request_iterator: AsyncIterator[pb.CreateRunRequest], context: Context
    ) -> pb.CreateRunResponse:
        """Takes adapter version 0 and begins a run with it."""
        header: pb.CreateRunHeader = await first_header(request_iterator)
        run, manifest = await self._store.compute(new_run, header, self._store.clock.time())
        known = await self._store.transact(self._store.db.run_by_request, header.request_id)
        if known:
            return await self._repeated(known, run)
        new = NewVersion(run.id, 0, "")
        if run.relay:
            new = NewVersion.relayed(run.id, run.version)
            with suppress(RunNotFound):
                await self._runs.look_up(run.id)
                raise RequestIdReused(f"{run.id} is here already, so it cannot be made as the part of a parent's run")
        await self._uploads.receive_version(new.spool_key, manifest, context)
        stored = partial(stored_version, self._store, new, run, manifest)
        try:
            engine = await self._runs.create(run, new, stored, actor())
        except RequestIdReused:
            known = await self._store.transact(self._store.db.run_by_request, header.request_id)
            if known is None:
                raise
            return await self._repeated(known, run)
        return pb.CreateRunResponse(run=await self._run(engine))

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """Shows a run and its round in progress."""
        engine = await self._runs.look_up(request.run)
        response = pb.GetRunResponse(run=await self._run(engine))
        if engine.active:
            response.round.CopyFrom(await self._history.one(engine, engine.round))
        return response

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """Shows runs, a page at a time."""
        most, place = pages.size(request.page_size), pages.position(request.page_token, of=("runs",), first=(0.0, ""))
        shown, listed = pages.Filling[run_pb2.Run](), self._runs.after(place, most + 1)
        figures = await self._store.read(self._store.db.initial_evaluations, [run for _, run in listed[:most]])
        last, more = place, len(listed) > most
        for age in listed[:most]:
            engine = self._runs.find(age[1])  # one may be deleted while evaluators' work is read
            if engine is not None and not shown.takes(await self._message(engine, figures.get(age[1], {}))):
                more = True
                break
            last = age
        return pb.ListRunsResponse(runs=shown.taken, next_page_token=pages.token(last, of=("runs",)) if more else "")

    async def ListRounds(self, request: pb.ListRoundsRequest, context: Context) -> pb.ListRoundsResponse:
        """Shows the rounds of a run, a page at a time."""
        most, of = pages.size(request.page_size), ("rounds", request.run, request.after, request.without_records)
        engine = await self._runs.look_up(request.run)
        place = pages.position(request.page_token, of=of, first=(min(request.after, engine.round.number), "", 0))
        records = not request.without_records
        rounds, then = await self._history.part(engine, Place(*place), most, records=records)
        token = pages.token((then.after, then.client, then.record), of=of) if then else ""
        return pb.ListRoundsResponse(rounds=rounds, next_page_token=token)

    async def WatchRun(self, request: pb.WatchRunRequest, context: Context) -> AsyncIterator[pb.WatchRunResponse]:
        """Sends a run, and after every change what is new of it."""
        engine = await self._runs.look_up(request.run)
        news = self._runs.watchers.watch(request.run)
        told: Round | None = None
        try:
            while True:
                scored = news.take()
                run, now = await self._run(engine), engine.round
                part: list[run_pb2.Round] = []
                async with aclosing(self._history.changes(engine, told, request.after, scored)) as parts:
                    async for following in parts:
                        if part:
                            yield pb.WatchRunResponse(run=run, rounds=part, more=True)
                        part = following
                yield pb.WatchRunResponse(run=run, rounds=part)
                if run.state in FINISHED:
                    return
                told = now
                await news.come()
                self._runs.get(request.run)
                await asyncio.sleep(self._timing.watch_gather_s)
        finally:
            self._runs.watchers.unwatch(request.run, news)

    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.PauseRunResponse:
        """Lets no new round open."""
        engine = await self._runs.look_up(request.run)
        await engine.pause(untrusted_text.reason(request.reason), actor())
        return pb.PauseRunResponse(run=await self._run(engine))

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.ResumeRunResponse:
        """Lets rounds open again."""
        engine = await self._runs.look_up(request.run)
        await engine.resume(actor())
        return pb.ResumeRunResponse(run=await self._run(engine))

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.StopRunResponse:
        """Ends a run for good."""
        engine = await self._runs.look_up(request.run)
        await engine.stop(untrusted_text.reason(request.reason), actor())
        return pb.StopRunResponse(run=await self._run(engine))

    async def RollbackRun(self, request: pb.RollbackRunRequest, context: Context) -> pb.RollbackRunResponse:
        """Takes a run back to an earlier version."""
        engine = await self._runs.look_up(request.run)
        await engine.roll_back(request.version, untrusted_text.reason(request.reason), actor())
        return pb.RollbackRunResponse(run=await self._run(engine))

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: Context) -> pb.DeleteRunResponse:
        """Removes a finished run."""
        await self._runs.delete(request.run, actor())
        return pb.DeleteRunResponse()

    async def DownloadAdapter(  # type: ignore[override]  # bytes too
        self, request: pb.DownloadAdapterRequest, context: Context
    ) -> AsyncIterator[pb.DownloadAdapterResponse | bytes]:
        """Sends an adapter version as the file that is stored."""
        engine = await self._runs.with_version(request.run, request.version)
        number = request.version if request.HasField("version") else engine.run.version
        row = await self._store.transact(self._store.db.retention.version, engine.run.id, number)
        async with (
            engine.noting_corruption(number),
            self._store.opened(self._store.blobs.open, file_key(row), row.sha256, Kind.VERSION) as file,
        ):
            if request.offset > row.size_bytes:
                text = f"is {request.offset}; the file has {row.size_bytes} bytes"
                raise OffsetOutOfRange(f"the offset {text}", (("offset", text),))
            digest = bytes.fromhex(row.sha256)
            header = pb.DownloadHeader(version=number, size_bytes=row.size_bytes, sha256=digest)
            yield pb.DownloadAdapterResponse(header=header)
            for offset, length in chunks(request.offset, row.size_bytes):
                data = await self._store.file(file.read, offset, length)
                yield chunk_messages.write(offset, data)

    async def SupplyVersion(
        self, request_iterator: AsyncIterator[pb.SupplyVersionRequest], context: Context
    ) -> pb.SupplyVersionResponse:
        """Takes a version of the parent's server, and begins the round after it."""
        engine = await self._relaying.supply(request_iterator, context)
        return pb.SupplyVersionResponse(run=await self._run(engine))

    async def DownloadSum(  # type: ignore[override]  # bytes too
        self, request: pb.DownloadSumRequest, context: Context
    ) -> AsyncIterator[pb.DownloadSumResponse | bytes]:
        """Sends the sum of the updates of a round."""
        async with aclosing(self._relaying.sum_of(request)) as parts:
            async for part in parts:
                yield part

    async def ListClients(self, request: pb.ListClientsRequest, context: Context) -> pb.ListClientsResponse:
        """Shows every client that ever registered, a page at a time."""
        most, (after,) = pages.size(request.page_size), pages.position(request.page_token, of=("clients",), first=("",))
        await self._sessions.write(self._store)
        rows = await self._store.read(self._store.db.clients_from, after, most + 1)
        active = self._runs.active()
        order = {engine.run.id: number for number, engine in enumerate(active)}
        clients = pages.fitting(self._client(row, order) for row in rows[:most])
        token = pages.token((clients[-1].id,), of=("clients",)) if len(clients) < len(rows) else ""
        return pb.ListClientsResponse(clients=clients, next_page_token=token)

    async def ReadmitClient(self, request: pb.ReadmitClientRequest, context: Context) -> pb.ReadmitClientResponse:
        """Lets a client back that was set aside."""
        if await self._store.transact(self._store.db.client, request.client) is None:
            raise ClientNotFound(
                f"no client {request.client[:64]!r} ever registered; `fedpeft client list` shows who did"
            )
        return pb.ReadmitClientResponse(runs=await self._runs.readmit(request.client, request.run, actor()))

    async def GetStorage(self, request: pb.GetStorageRequest, context: Context) -> pb.GetStorageResponse:
        """Shows the room on the disks, and what is stored there."""
        disks: list[pb.Disk] = []
        for place in self._store.room.folders:
            with suppress(OSError):
                disks.append(disk_message(await self._store.file(self._store.room.disk, place)))
        return pb.GetStorageResponse(disks=disks, stored_bytes=self._store.stored_bytes)

    def _client(self, row: ClientRow, order: Mapping[str, int]) -> pb.Client:
        found = self._runs.progress.of(row.id, self._runs.is_usable)
        progress = progress_message(row.id, *found) if found else None
        answers, scoring = self._runs.participation.of(row.id, order), self._sessions.scoring(row.id)
        return client_message(row, self._activity(row.id, training=bool(found)), answers, scoring, progress)

    def _activity(self, client: str, *, training: bool) -> str:
        if self._runs.progress.is_uploading(client):
            return "uploading"
        if self._runs.lobby.is_waiting(client):
            return "waiting"
        if training:
            return "training"
        return "scoring" if self._sessions.scoring(client) else "away"

    async def _run(self, engine: RunEngine) -> run_pb2.Run:
        run = engine.run.id
        found = await self._store.read(self._store.db.initial_evaluations, [run])
        return await self._message(engine, found.get(run, {}))

    async def _message(self, engine: RunEngine, figures: Mapping[str, float]) -> run_pb2.Run:
        """Returns a run as operators see it; `figures` are those of its version 0."""
        reason = self._runs.why(engine, for_operator=True) if engine.active else ""
        answers, run = self._runs.participation, engine.run.id
        message = run_message(engine.run, reason, figures, answers.declines(run), answers.set_aside(run))
        message.reason += withdrawn(engine)
        for scored in (await self._runs.scoring.progress_of_all(engine.run))[:EVALUATORS]:
            given = self._sessions.scoring(scored.evaluator)
            now = given[1] if given and given[0] == engine.run.id else None
            message.evaluators.append(scoring_message(scored, now))
        for client, progress, verdict in self._runs.progress.awaited(engine, AWAITED):
            message.awaited.append(progress_message(client, run, progress, verdict))
        return message

    async def _repeated(self, known: RunRow, asked: RunRow) -> pb.CreateRunResponse:
        if known.request_digest != asked.request_digest:
            raise RequestIdReused(f"request {asked.request_id} already made {known.id}, which differs")
        return pb.CreateRunResponse(run=await self._run(await self._runs.adopt(known.id)))
