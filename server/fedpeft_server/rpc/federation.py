"""FederationService: what clients and evaluators call. The semantics are in `federation_service.proto`."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Collection
from functools import partial

from fedpeft import PROTOCOL, __version__, ids, seeds
from fedpeft.adapters.payload import chunks
from fedpeft.config import PLAIN
from fedpeft.errors import (
    AnswerInvalid,
    CapabilitiesInvalid,
    DatabaseLocked,
    DigestInvalid,
    MetricsInvalid,
    NotAnEvaluator,
    OffsetOutOfRange,
    PageInvalid,
    ProtocolMismatch,
    RunsInvalid,
    StoreUnavailable,
    TicketNotFound,
    TicketOfAnother,
)
from fedpeft.process import tracing
from fedpeft.rounds import metric_values, state_machine
from fedpeft.rounds.schedule import training_of
from fedpeft.rounds.tickets import Ticket, round_from
from fedpeft.rpc.timing import HOLD_S, LONGEST_HOLD_S
from fedpeft.rpc.wire import training_to_proto
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.v1 import run_pb2
from fedpeft_server.access import untrusted_text
from fedpeft_server.access.call import CALL, actor
from fedpeft_server.metrics import Metrics
from fedpeft_server.rpc import pages
from fedpeft_server.rpc.caller_log import CallerLog
from fedpeft_server.rpc.chunk_cache import ChunkCache
from fedpeft_server.rpc.messages import ROLES, RUN_STATES, TICKET_STATES, receipt_message, run_message, timestamp
from fedpeft_server.rpc.sessions import Sessions
from fedpeft_server.runs.engine import RunEngine
from fedpeft_server.runs.progress import Report, State
from fedpeft_server.runs.runs import Runs
from fedpeft_server.runs.ticket_index import is_closed_elsewhere
from fedpeft_server.store.blobs.download_cache import Encoded
from fedpeft_server.store.rows import AnswerRow, ClientRow, FailedEvaluation, RunRow, for_sites
from fedpeft_server.store.store import Store, file_key
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.uploads.incoming import Context, first_header
from fedpeft_server.uploads.pipeline import Uploads
from fedpeft_server.uploads.transfer_slots import TransferSlots

_LISTED = 16
"""Most runs that Register lists; AwaitRound offers all of them, so this is for callers that only want to show some."""
_LISTED_BYTES = 256 * 1024
MAX_LEFT_OUT = 32
"""Most runs that a client leaves out of a call for work."""
MAX_CHECKED = 32
"""Most runs of one CheckRuns."""
_EXPLAINED = 8
"""Runs whose wait is explained to a client that waits; more are counted."""

_NOTHING_LEFT = "there is no unfinished run to work for"
_ALL_DECLINED = "this client declined every unfinished run"
_SPLIT = re.compile(r"[a-z0-9_-]{1,64}")
_ROLE_NAMES = {number: name for name, number in ROLES.items()}


class Federation(pb_grpc.FederationServiceServicer):
    """The service of the devices."""

    def __init__(
        self,
        runs: Runs,
        store: Store,
        sessions: Sessions,
        uploads: Uploads,
        downloads: TransferSlots,
        byte_counter: ByteCounter,
        metrics: Metrics,
        caller_log: CallerLog,
    ) -> None:
        self._runs = runs
        self._store = store
        self._sessions = sessions
        self._uploads = uploads
        self._downloads = downloads
        self._chunks = ChunkCache(store)
        self._byte_counter = byte_counter
        self._metrics = metrics
        self._log = caller_log

    async def Register(self, request: pb.RegisterRequest, context: Context) -> pb.RegisterResponse:
        """Announces a client; a dry run is only told what it would hear."""
        sessions = self._sessions
        follows = await self._follow(context)
        if request.run:
            await self._runs.look_up(request.run)
        role = _ROLE_NAMES.get(request.role)
        if role is None:
            raise CapabilitiesInvalid("the role must be trainer or evaluator", (("role", "is unspecified"),))
        earlier = untrusted_text.processes(request.earlier_processes)
        if request.dry_run:
            client = sessions.check_registration(context, role, earlier)
        else:
            client = sessions.identify(context, registers=True, earlier=earlier)
        _check_protocol(request)
        capabilities = untrusted_text.capabilities(request.capabilities)
        response = self._welcome(request)
        if request.dry_run:
            return response
        if self._sessions.register(client, role) == "evaluator" != role:
            self._runs.dismiss_evaluator(client)
        self._runs.ask_again(client)
        if role == "evaluator":
            await self._runs.scoring.try_again(client)
        (instance, process), said = self._sessions.holder(client), capabilities.SerializeToString()
        now = self._store.clock.time()
        row = ClientRow(client, instance, role, said, now, now, process=process, follows=follows)
        if not await self._store.registrations.put(row):
            raise DatabaseLocked(
                f"another process of client {client} registered with another server meanwhile; try again"
            )
        self._log.info("client registered", client=client, role=role, device=capabilities.device)
        return response

    async def AwaitRound(self, request: pb.AwaitRoundRequest, context: Context) -> pb.AwaitRoundResponse:
        """Answers when there is something to do for the client."""
        client = await self._identify(context)
        role = self._sessions.role(client)
        look = self._evaluation if role == "evaluator" else self._training
        if request.run:
            await self._runs.look_up(request.run)
        left_out = frozenset(run for run in request.left_out[:MAX_LEFT_OUT] if ids.RUN.fullmatch(run))
        until = time.monotonic() + max(HOLD_S, min(request.hold_s, LONGEST_HOLD_S))
        while True:
            found = await look(client, request.run, left_out)
            if found:
                return found
            hold_s = until - time.monotonic()
            over = hold_s <= 0 or (request.until_finished and self._finished(client, request.run))
            if over or not await self._runs.lobby.wait(
                client, request.run, trainer=role == "trainer", hold_s=hold_s, left_out=left_out
            ):
                return self._idle(client, request.run)
            if role == "trainer" and self._finished(client, request.run):
                return self._idle(client, request.run)

    async def AnswerOffer(self, request: pb.AnswerOfferRequest, context: Context) -> pb.AnswerOfferResponse:
        """Takes what a client says to the offer of a run."""
        client = await self._identify(context)
        self._sessions.role(client)
        reasons = untrusted_text.decline(request.reasons)
        accepted = request.answer == pb.ANSWER_ACCEPTED
        if not accepted and request.answer != pb.ANSWER_DECLINED:
            raise AnswerInvalid("the answer must be accepted or declined", (("answer", "is unspecified"),))
        if not accepted and not reasons:
            raise AnswerInvalid("a decline must say why", (("reasons", "are empty"),))
        if request.examples > untrusted_text.MAX_EXAMPLES:
            fault = f"is {request.examples}; at most {untrusted_text.MAX_EXAMPLES} are taken"
            raise AnswerInvalid(f"examples {fault}", (("examples", fault),))
        await self._runs.look_up(request.run)
        if accepted and (unable := self._unable(client, request)):
            accepted, reasons = False, (unable,)
        now = self._store.clock.time()
        answer = AnswerRow(request.run, client, accepted, () if accepted else reasons, request.examples, now)
        await self._runs.answer(answer, actor())
        if self._sessions.role(client) == "evaluator":
            engine = self._runs.get(answer.run)
            note = self._runs.scoring.takes_part if accepted else self._runs.scoring.leaves
            note(answer.run, client)
            self._runs.show_backlog(engine)
        self._log.info(
            "run accepted" if accepted else "run declined", client=client, run=request.run, reasons=answer.reasons
        )
        return pb.AnswerOfferResponse()

    def _unable(self, client: str, request: pb.AnswerOfferRequest) -> str:
        """Returns why a client that accepts a run cannot train as the run wants of all; empty if it can."""
        config = self._runs.get(request.run).run.config
        if self._sessions.role(client) == "evaluator":
            return ""
        algorithm, privacy = config.training.algorithm, config.privacy
        said = untrusted_text.software(request.algorithm) or PLAIN
        if algorithm is not None and said != algorithm.name:
            return f"it would train by the algorithm {said!r}, and the run's is {algorithm.name!r}; update its software"
        noise = untrusted_text.software(request.mechanism)
        if privacy is not None and privacy.is_of_clients and noise != privacy.mechanism:
            would = f"noise by the mechanism {noise!r}" if noise else "no noise to what it sends"
            return f"it would add {would}, and the run's is {privacy.mechanism!r}; update its software"
        return ""

    async def PullAdapter(  # type: ignore[override]  # bytes too
        self, request: pb.PullAdapterRequest, context: Context
    ) -> AsyncIterator[pb.PullAdapterResponse | bytes]:
        """Sends an adapter version."""
        client = await self._identify(context)
        _check_digest("have_sha256", request.have_sha256)
        engine = await self._runs.with_version(request.run, request.version)
        training = self._sessions.role(client) == "trainer"
        number = round_from(request.version) if training else request.version
        self._byte_counter.assign(engine.run.id, number, client, training=training)
        refusals = self._runs.progress.noting_refusals(engine.run.id, client, State.TRAINING)
        async with engine.noting_corruption(request.version):
            with refusals:
                encoded = await self._encoded(engine.run, request.version)
                have = request.have_version if request.HasField("have_version") else None
                manifest, selection = encoded.manifest, encoded.selection(engine.run.spec, have)
                size = selection.size_bytes
                if request.offset > size:
                    text = f"is {request.offset}; {size} bytes are sent"
                    raise OffsetOutOfRange(f"the offset {text}", (("offset", text),))
                held = request.have_sha256 == manifest.sha256
                header = pb.PullHeader(version=request.version, manifest=encoded.described, up_to_date=held)
                if size < manifest.payload_bytes and not held:
                    header.tensors.extend(selection.tensors)
                yield pb.PullAdapterResponse(header=header)
                if held:
                    return
                if request.offset:
                    await self._byte_counter.resumed(self._store, request.offset)
                place = encoded.row, file_key(encoded.row)
                opening = partial(self._store.download_cache.open, engine.run, *place, selection)
                async with self._downloads.take(client) as slot, self._store.opened_late(opening) as file:
                    CALL.get().slot = slot
                    for offset, length in chunks(request.offset, size):
                        if offset > request.offset:
                            slot.check()
                        yield await self._chunks.get((manifest.sha256, selection), file, offset, length)
                        # Only now: were it booked before, the database could have a payload that was never sent.
                        self._byte_counter.payload("down", engine.run.config.codec.down, length)

    async def _encoded(self, run: RunRow, version: int) -> Encoded:
        """Returns a version as it goes to clients; its row never changes, so one that is encoded needs no look."""
        known = self._store.download_cache.known(run.id, version)
        if known:
            return known
        row = await self._store.transact(self._store.db.retention.version, run.id, version)
        return await self._store.version(self._store.download_cache.encoded, run, row, file_key(row))

    async def PushUpdate(
        self, request_iterator: AsyncIterator[pb.PushUpdateRequest], context: Context
    ) -> pb.PushUpdateResponse:
        """Receives an update; the answer means that it is durable."""
        client = await self._identify(context)
        header: pb.UpdateHeader = await first_header(request_iterator)
        engine, ticket = await self._ticket(header.ticket, client)
        noting_refusals = self._runs.progress.noting_refusals(engine.run.id, client, State.UPLOADING)
        with noting_refusals, tracing.span("receive", engine.run.id, ticket.issued_in, client=client):
            update = await self._uploads.push(engine, ticket, header, context)
        return receipt_message(update)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Context) -> pb.GetUploadResponse:
        """Returns the state of an upload."""
        client = await self._identify(context)
        _check_digest("sha256", request.sha256)
        engine, ticket = await self._ticket(request.ticket, client)
        report = Report(request.step, request.steps, request.updates, request.updates_wanted)
        self._runs.progress.report(ticket.id, report)
        received = await self._uploads.received(ticket)
        answer = pb.GetUploadResponse(
            state=TICKET_STATES[ticket.state], run_finished=not engine.active, reason=for_sites(ticket.reason)
        )
        if received:
            answer.committed_bytes = received.manifest.payload_bytes
            answer.receipt.CopyFrom(receipt_message(received))
            return answer
        try:
            answer.committed_bytes = await self._store.file(self._store.updates.position, ticket.id, request.sha256)
        except StoreUnavailable as error:
            self._runs.progress.note_refusal(engine.run.id, client, State.UPLOADING, error)
            raise
        return answer

    async def Withdraw(self, request: pb.WithdrawRequest, context: Context) -> pb.WithdrawResponse:
        """Gives a ticket up."""
        client = await self._identify(context)
        engine, ticket = await self._ticket(request.ticket, client)
        try:
            state = await engine.withdraw(ticket, untrusted_text.reason(request.reason), actor())
        except TicketNotFound:  # its round is over
            state = (await self._runs.ticket(ticket.id))[1].state
        return pb.WithdrawResponse(state=TICKET_STATES[state])

    async def CheckRuns(self, request: pb.CheckRunsRequest, context: Context) -> pb.CheckRunsResponse:
        """Returns the states of some runs."""
        await self._identify(context)
        if len(request.runs) > MAX_CHECKED:
            fault = f"has {len(request.runs)} ids; at most {MAX_CHECKED} are taken"
            raise RunsInvalid(f"runs {fault}", (("runs", fault),))
        unknown = run_pb2.RUN_STATE_UNSPECIFIED
        found = {run: RUN_STATES[state] for run, state in (await self._runs.states(request.runs)).items()}
        return pb.CheckRunsResponse(runs=[pb.RunStanding(run=r, state=found.get(r, unknown)) for r in request.runs])

    async def PushEvaluation(self, request: pb.PushEvaluationRequest, context: Context) -> pb.PushEvaluationResponse:
        """Takes figures of a version."""
        client = await self._identify(context)
        if self._sessions.role(client) != "evaluator":
            raise NotAnEvaluator(f"client {client} registered as a trainer; figures come from evaluators")
        engine = await self._runs.with_version(request.run, request.version)
        self._byte_counter.assign(engine.run.id, request.version, client, training=False)
        if request.failure:
            return await self._cannot_score(request, engine, client)
        metric_values.check_evaluation(request.metrics)
        split = request.split or "test"
        if not _SPLIT.fullmatch(split):
            fault = "must be 1 to 64 of lower-case letters, digits, '_' and '-'"
            raise MetricsInvalid(f"split {split[:80]!r} {fault}", (("split", fault),))
        metrics, now = dict(request.metrics), self._store.clock.time()
        put = self._store.db.put_evaluation
        await self._store.transact(put, engine.run.id, request.version, client, split, metrics, now)
        self._sessions.scored(client, (engine.run.id, request.version))
        await self._runs.scoring.scored(engine.run.id, client, request.version)
        self._runs.show_backlog(engine)
        self._metrics.scored(engine.run.id, split, metrics)
        self._log.info(
            "version evaluated", run=engine.run.id, version=request.version, accuracy=metrics.get("accuracy")
        )
        self._runs.watchers.announce(engine.run.id, request.version)
        return pb.PushEvaluationResponse()

    async def _cannot_score(
        self, request: pb.PushEvaluationRequest, engine: RunEngine, client: str
    ) -> pb.PushEvaluationResponse:
        """Records that an evaluator cannot score a version, so that it gets the others."""
        run, version = engine.run.id, request.version
        if request.metrics:
            fault = "come with a failure, which says that there are none"
            raise MetricsInvalid(f"metrics {fault}", (("metrics", fault),))
        reason, now = untrusted_text.reason(request.failure), self._store.clock.time()
        failure = FailedEvaluation(run, version, client, reason, now)
        await self._runs.scoring.failed(failure)
        self._sessions.scored(client, (run, version))
        self._runs.show_backlog(engine)
        self._metrics.evaluations_failed.labels(run).inc()
        self._log.info("version cannot be scored", run=run, version=version, client=client, reason=failure.reason)
        self._runs.watchers.announce(run)
        return pb.PushEvaluationResponse()

    async def _identify(self, context: Context) -> str:
        """Returns the id of the client that calls, as `Sessions.identify`; it may have registered with another daemon.

        Raises:
            FedpeftError: As `Sessions.identify`.
        """
        if self._sessions.is_strange(context):
            await self._follow(context)
        return self._sessions.identify(context)

    async def _follow(self, context: Context) -> tuple[str, str] | None:
        """Takes up what others know of a caller, and returns its `ClientRow.follows`; may raise ClientIdInUse."""
        if not self._store.db.is_shared:
            return None
        row = await self._store.transact(self._store.db.client, self._sessions.claimed(context))
        if row is None:
            return "", ""
        waits = self._runs.lobby.waits_elsewhere(row.id)
        self._sessions.refuse_another(context, row, self._store.clock.time(), waits=waits)
        if (registered := self._sessions.follow(row)) is not None:
            self._runs.follow_registration(registered.client, registered.before, registered.role)
        return row.instance, row.process

    def _welcome(self, request: pb.RegisterRequest) -> pb.RegisterResponse:
        """Returns the answer to Register, with a page of the runs where they were asked for, and else the first few."""
        if request.page_token and not request.dry_run:
            fault = "is for a call with dry_run; AwaitRound offers the runs one by one"
            raise PageInvalid(f"page_token {fault}", (("page_token", fault),))
        of = ("registration", request.run)
        place = pages.position(request.page_token, of=of, first=(0.0, ""))
        engines = self._runs.all(request.run) if request.run else self._runs.active()
        left = [engine for engine in engines if engine.age > place]
        most, room = (pages.MOST, pages.PAGE_BYTES) if request.dry_run else (_LISTED, _LISTED_BYTES)
        runs = pages.fitting((run_message(e.run.for_sites, self._runs.why(e), {}) for e in left[:most]), room)
        more = request.dry_run and len(runs) < len(left)
        token = pages.token(left[len(runs) - 1].age, of=of) if more else ""
        return pb.RegisterResponse(protocol=PROTOCOL, runs=runs, next_page_token=token)

    async def _training(self, client: str, run: str, left_out: Collection[str]) -> pb.AwaitRoundResponse | None:
        """Returns the ticket that the client can use now, in the oldest run that gave it one, or else an offer."""
        answers = self._runs.participation
        due: RunEngine | None = None
        for engine in self._runs.active(run):
            if engine.run.id in left_out:
                continue
            ticket = engine.open_ticket(client)
            if ticket and await is_closed_elsewhere(ticket, self._store):
                await self._runs.follow(engine.run.id)
                if not self._runs.is_usable(engine.run.id, client, ticket.id):
                    return await self._training(client, run, left_out)  # another run may have sampled it meanwhile
                ticket = None
            if ticket and answers.accepted(engine.run.id, client):
                self._byte_counter.assign(engine.run.id, ticket.issued_in, client)
                return pb.AwaitRoundResponse(training=_task(engine, ticket))
            # The run whose ticket a restarted client holds comes first: its round waits.
            if answers.is_due(engine.run.id, client) and (due is None or ticket):
                due = engine
        if due is None:
            return None
        answers.mark_offered(due.run.id, client)
        return _offer(due)

    async def _evaluation(self, client: str, run: str, left_out: Collection[str]) -> pb.AwaitRoundResponse | None:
        """Returns the version that the evaluator scores next, or the offer of a run that has some.

        The newest version of a run comes first, of all runs; then, when those are scored, what was missed: of runs that
        go on before finished ones, of older runs before younger ones.
        """
        answers, best = self._runs.participation, None
        missing = await self._runs.scoring.missing(client)
        wanted = [each for each in ((run,) if run else missing) if each in missing and each not in left_out]
        for engine in sorted(map(self._runs.get, wanted), key=lambda e: e.age):
            newest = missing[engine.run.id]
            if answers.declined(engine.run.id, client):
                self._runs.scoring.leaves(engine.run.id, client)
                continue
            if answers.is_due(engine.run.id, client):
                return _offer(engine)
            order = (newest == engine.run.version, engine.active)
            if best is None or order > best[0]:
                best = order, engine.run.id, newest
        self._sessions.scores(client, best[1:] if best else None)
        if best is None:
            return None
        self._byte_counter.assign(best[1], best[2], client, training=False)
        return pb.AwaitRoundResponse(evaluation=pb.EvaluationTask(run=best[1], version=best[2]))

    def _idle(self, client: str, run: str) -> pb.AwaitRoundResponse:
        active = self._runs.active(run)
        left = [engine for engine in active if self._is_left(engine, client)]
        more = f"; and {len(left) - _EXPLAINED} more runs" if len(left) > _EXPLAINED else ""
        reason = "; ".join(self._runs.why(e) for e in left[:_EXPLAINED]) + more
        nothing = _ALL_DECLINED if active else _NOTHING_LEFT
        finished = not left and self._runs.exist(run)
        return pb.AwaitRoundResponse(
            idle=pb.Idle(reason=reason or nothing, finished=finished, hold_s=self._runs.lobby.longer_hold_s())
        )

    def _finished(self, client: str, run: str) -> bool:
        left = any(self._is_left(engine, client) for engine in self._runs.active(run))
        return not left and self._runs.exist(run)

    def _is_left(self, engine: RunEngine, client: str) -> bool:
        """Returns True if a client did not decline an unfinished run."""
        return not self._runs.participation.declined(engine.run.id, client)

    async def _ticket(self, ticket_id: str, client: str) -> tuple[RunEngine, Ticket]:
        engine, ticket = await self._runs.ticket(ticket_id)
        if ticket.client != client:
            raise TicketOfAnother(f"{ticket_id} was given to another client")
        self._byte_counter.assign(engine.run.id, ticket.issued_in, client)
        return engine, ticket


def _check_protocol(request: pb.RegisterRequest) -> None:
    if request.max_protocol < PROTOCOL:
        raise ProtocolMismatch(
            f"this client speaks protocol {request.max_protocol}, the server {PROTOCOL} (fedpeft {__version__}); "
            "upgrade the client"
        )
    if request.min_protocol > PROTOCOL:
        raise ProtocolMismatch(
            f"this client speaks protocol {request.min_protocol} or newer, the server {PROTOCOL} "
            f"(fedpeft {__version__}); upgrade the server"
        )


def _offer(engine: RunEngine) -> pb.AwaitRoundResponse:
    return pb.AwaitRoundResponse(offer=pb.RunOffer(run=run_message(engine.run.for_sites, "", {})))


def _task(engine: RunEngine, ticket: Ticket) -> pb.TrainingTask:
    config, number = engine.run.config, ticket.issued_in
    return pb.TrainingTask(
        ticket=ticket.id,
        run=engine.run.id,
        round=number,
        version=ticket.base_version,
        deadline=timestamp(state_machine.due(engine.round, ticket, config.rounds)),
        seed=seeds.training(config.rounds.seed, number, ticket.client),
        settings=training_to_proto(training_of(config, number)),
    )


def _check_digest(field: str, sha256: bytes) -> None:
    """Refuses a digest that names no payload, which else would be one that is not held.

    Raises:
        DigestInvalid: If it is neither absent nor 32 bytes long.
    """
    if len(sha256) not in (0, 32):
        text = f"has {len(sha256)} bytes; a SHA-256 digest has 32"
        raise DigestInvalid(f"{field} {text}", ((field, text),))
