"""The agent's life, as a machine whose every state is either on disk or can be lost.

    register <------------ NOT_REGISTERED, whatever was being done: the server was set up anew
       |
       v
    push what is pending <--------------------------------------------+
       |                                                              |
       v                                                              |
    await round --- offer ------> judge, then accept or decline --->--+
       |  |  |                         ^                              |
       |  |  |                         | the data or the model does   |
       |  |  |                         | not suit after all: decline  |
       |  |  +----- training ---> pull, train -----------------> pending update, on disk
       |  |                            |                              |
       |  +-------- evaluation -> pull, score, report                 |
       |                               | failed otherwise: withdraw,  |
       |                               | pause, and go on; a run that |
       |                               | fails is left out for a while|
       |                               +------------------------------+
       +-- idle: again; `--once` and nothing is left: END

Only the pending update, the residual and the local tensors must survive a kill, and they are on disk. The server keeps
the ticket and the answers, and gives or asks for them again. So a restart is the same as any other way into `register`.
An end that is none of these is an error that only a person can mend.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version

from fedpeft import PROTOCOL
from fedpeft.codecs import codecs
from fedpeft.errors import (
    ClientIdInUse,
    ClientMoved,
    FedpeftError,
    IdentityInvalid,
    InvalidArgument,
    LocalError,
    NotFound,
    NotRegistered,
    RefusedByPolicy,
    RunFinished,
    RunNotFound,
    StateInvalid,
    TicketClosed,
    TicketNotFound,
    TrainingFailed,
    VersionNotFound,
    VersionRemoved,
)
from fedpeft.process import durable, tracing
from fedpeft.process.logs import Log
from fedpeft.untrusted_text import MAX_REASON
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.eligibility.rules import Reason, reasons_against_ticket
from fedpeft_client.error_policy import FAULT, NOT_ABOUT_THE_TASK, UNFIT
from fedpeft_client.owner.limits import Limits
from fedpeft_client.owner.metrics import Metrics, State
from fedpeft_client.owner.policy import Policy
from fedpeft_client.settings import Settings
from fedpeft_client.state.adapters import AdapterCache, CachedAdapter
from fedpeft_client.state.outbox import Outbox, Outcome
from fedpeft_client.state.processes import Processes
from fedpeft_client.state.run_backoff import RunBackoff
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.attempts import Attempts
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.exclusion_check import ExclusionCheck
from fedpeft_client.uplink.finished_runs import FinishedRuns
from fedpeft_client.uplink.pace import Pace
from fedpeft_client.uplink.pull import Puller
from fedpeft_client.uplink.push import Pusher
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.uplink.ticket_watch import run_while_ticket_open
from fedpeft_client.uplink.training_progress import TrainingProgress
from fedpeft_client.uplink.wire_checks import said
from fedpeft_client.uplink.withdrawals import Withdrawals
from fedpeft_client.worker.edge_end import EdgeEnd
from fedpeft_client.worker.evaluator import Evaluator
from fedpeft_client.worker.handle import Answer, WorkerProcess
from fedpeft_client.worker.trainer import Trainer
from fedpeft_client.worker.verdicts import Verdict, Verdicts

MAX_REASONS = 8
"""Most reasons that the server keeps of one answer."""

EVALUATIONS = 3
"""Most attempts of an evaluator to score a version."""
_NOBODYS_FAULT = frozenset(
    error.reason
    for error in (
        RefusedByPolicy,
        RunFinished,
        RunNotFound,
        TicketClosed,
        TicketNotFound,
        VersionNotFound,
        VersionRemoved,
    )
)
"""Reasons for the end of a task that say nothing against its run: the hour, or that it is over."""


class _NotAccepted(Exception):
    """The server gave work for a run that this process did not accept; registering has it offered."""


class Agent:
    """One client, from its first call to its last.

    Args:
        settings: The client's settings.
        policy: Limits that its owner sets.
        directory: Its memory, held by this process.
        channel: The server.
        worker: The process that computes.
        egress_log: The log of all that leaves the device.
        metrics: The client's metrics.
        log: Carries the client's id.
    """

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        directory: StateDirectory,
        channel: Channel,
        worker: WorkerProcess,
        egress_log: EgressLog,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._directory = directory
        self._channel = channel
        self._worker = worker
        self._egress_log = egress_log
        self._metrics = metrics
        self._log = log
        self._outbox = Outbox(directory, policy.digest)
        self._processes = Processes(directory.path, channel.process)
        self._retry = Retry(log, channel.timing.call_s if settings.once else None, channel.timing)
        self._limits = Limits(policy, egress_log, metrics, log, waits=not settings.once, timing=channel.timing)
        self._withdrawals = Withdrawals(channel, self._retry, egress_log)
        sums = settings.relay is not None
        self._exclusion_check = ExclusionCheck(channel, self._retry, self._outbox, has_residual=not sums)
        self._pusher = Pusher(channel, self._retry, egress_log, self._limits.permit_upload, has_residual=not sums)
        self._trainer = Trainer(directory, self._outbox, worker, metrics)
        self._evaluator = Evaluator(channel, self._retry, worker, egress_log, metrics)
        self._verdicts = Verdicts(worker, log, None if settings.evaluate else settings.rank, of_sums=sums)
        self._holds = RunBackoff(timing=channel.timing)
        end = EdgeEnd(worker, channel, self._retry, directory, log) if sums else None
        self._finished = FinishedRuns(directory, self._outbox, channel, egress_log, metrics.series, log, end)
        self._attempts: Attempts[tuple[str, int]] = Attempts()
        self._setback = self._retry.backoff()
        self._pace = Pace(channel.timing)
        self._said_idle = False

    async def live(self) -> None:
        """Takes part until there is nothing left to do (`--once`), for ever otherwise.

        Raises:
            FedpeftError: What nothing but a person can mend: that includes that the run it was started for, or with
                `--once` every run there was, does not suit this site.
        """
        await self._register()
        if self._settings.once:
            self._retry.give_up_s = self._channel.timing.away_s
        while await self._on_good_terms(self._take_part):
            continue
        if misfit := self._verdicts.nothing_suits():
            raise misfit

    async def _register(self) -> None:
        hello = await self._worker.start()
        request = registration(self._settings, hello)
        self._metrics.data_rows.set(hello["rows"])
        request.earlier_processes.extend(await asyncio.to_thread(self._processes.earlier))
        await asyncio.to_thread(self._processes.registers)
        try:
            with self._egress_log.record(message_entries.registration(request)):
                await self._retry.call(lambda: self._channel.register(request), faults=None)
        except ClientMoved as error:
            raise self._processes.moved(error) from None
        await asyncio.to_thread(self._processes.registered)
        self._metrics.enter(State.WAITING)
        facts = {name: hello[name] for name in ("device", "threads") if name in hello}
        limits = len(self._policy.rules) or "none; this site has no policy"
        self._log.info("registered", server=self._settings.server, **facts, limits=limits)

    async def _on_good_terms(self, step: Callable[[], Awaitable[bool]]) -> bool:
        """Takes a step; registers again if the server does not know this process, or knows an older one as the last."""
        try:
            return await step()
        except (NotRegistered, _NotAccepted, ClientIdInUse) as error:
            if isinstance(error, ClientIdInUse) and not await asyncio.to_thread(self._processes.earlier):
                raise  # with no process before this one, it is a copy's
            why = "the server was restarted" if isinstance(error, NotRegistered) else str(error)
            self._log.info(f"{why}; registering again")
            await self._pace.nothing()
            await self._register()
            return True
        except OSError as error:
            raise self._named(error) from error

    async def _take_part(self) -> bool:
        """Pushes what is pending, awaits one task and does it; returns False once there is nothing left to do."""
        await self._push_pending()
        await self._finished.clean_up()
        await self._limits.permit(0 if self._settings.evaluate else self._verdicts.least_upload_bytes())
        wanted, once = self._settings.run or "", self._settings.once
        self._pace.begin()
        with self._metrics.during(State.WAITING):
            held = self._holds.held()
            response = await self._retry.call(
                lambda: self._channel.await_round(wanted, until_finished=once, left_out=held), faults=None
            )
        outcome = response.WhichOneof("outcome")
        self._said_idle = self._said_idle and outcome == "idle"
        match outcome:
            case "offer":
                await self._answer(response.offer.run)
            case "training":
                await self._train(response.training)
            case "evaluation":
                await self._evaluate(response.evaluation)
            case _:
                say = self._log.debug if self._said_idle else self._log.info  # once a wait; its reason changes often
                say("waiting", reason=said(response.idle.reason))
                self._said_idle = True
                if self._settings.relay is not None:  # people at the edge see the run until it is ended there
                    self._finished.look_soon()
                    await self._finished.clean_up()
                if response.idle.finished and once and not self._finished.ends_elsewhere:
                    return False
                await self._pace.nothing()
        return True

    async def _push_pending(self) -> None:
        """Uploads the update that this process, or one before it, trained; it is not trained again."""
        await asyncio.to_thread(self._outbox.finish)
        try:
            pending = await asyncio.to_thread(self._outbox.load)
        except StateInvalid as error:
            self._log.error("pending update is damaged and dropped; its ticket is trained again", cause=str(error))
            self._outbox.discard()
            return
        if pending is not None:
            log = self._log.bind(run=pending.run, round=pending.round)
            if pending.policy == self._policy.digest:
                with self._metrics.during(State.PUSHING), tracing.span("push", pending.run, pending.round):
                    outcome = await self._pusher.push(pending, log)
            else:
                log.warning("an update that was trained under another policy is not sent", ticket=pending.ticket)
                changed = RefusedByPolicy("the policy of this site changed after the update was trained")
                outcome = await self._pusher.give_up(pending, changed, log)
            self._metrics.updates.labels(pending.run, outcome).inc()
            await asyncio.to_thread(self._outbox.settle, pending, outcome)
            if outcome is Outcome.SET_ASIDE:
                log.error("the update is kept for a person to look at", folder=str(self._outbox.aside))
                self._leave_out(pending.run, surely=True)
            else:
                self._holds.succeeded(pending.run)

    async def _answer(self, run: run_pb2.Run) -> None:
        with self._metrics.during(State.JUDGING):
            new = not self._verdicts.knows(run)
            verdict = await self._verdicts.judge(run)
        await self._say(run.id, verdict)
        await self._pace.offered(new=new)

    async def _say(self, run: str, verdict: Verdict) -> None:
        """Tells the server whether this site takes part in a run.

        Raises:
            FedpeftError: If it does not, and was started for this run.
        """
        request = pb.AnswerOfferRequest(
            run=run,
            answer=pb.ANSWER_ACCEPTED if verdict.is_eligible else pb.ANSWER_DECLINED,
            reasons=[reason.public_text[:MAX_REASON] for reason in verdict.reasons[:MAX_REASONS]],
            examples=verdict.examples,
            algorithm=verdict.algorithm,
            mechanism=verdict.mechanism,
        )
        try:
            with self._egress_log.record(message_entries.answer(request, verdict.name)):
                await self._retry.call(lambda: self._channel.answer_offer(request))
        except NotFound as error:
            self._log.info("the run is gone already", run=run, cause=str(error))
        except FAULT as error:
            self._log.error("the answer to the offer could not be given", run=run, cause=str(error))
            self._leave_out(run, surely=True)
            return
        if verdict.is_eligible:
            self._metrics.examples.labels(run).set(verdict.examples)
        for reason in verdict.reasons:
            self._metrics.declines.labels(reason.kind).inc()
            self._log.error("run is declined", run=run, reason=reason.kind, cause=reason.local_text)
        if verdict.reasons and self._settings.run:
            raise verdict.reasons[0].error

    async def _train(self, task: pb.TrainingTask) -> None:
        log = self._log.bind(run=task.run, round=task.round)

        async def train() -> None:
            if await asyncio.to_thread(self._outbox.counted, task.run) == task.ticket:
                await self._send_again(task, log)
                return
            run, held = await self._pull(task.run, task.version, task.round)
            await self._exclusion_check.settle(run.id, log)
            steps = TrainingProgress()
            training = self._trainer.train(
                run, task, held, log, steps
            )  # what is pending is pushed next, as after a kill
            with self._metrics.during(State.TRAINING), tracing.span("train", task.run, task.round):
                permitted, keeps = self._limits.while_permitted(training), self._settings.relay is None
                await run_while_ticket_open(self._channel, task.ticket, permitted, steps, keeps_late=keeps)

        if failure := self._against(task) or await self._tried(task.run, train):
            say = log.warning if failure.kind in _NOBODYS_FAULT else log.error
            say("ticket is given up", cause=failure.local_text)
            self._metrics.tickets_given_up.labels(task.run, failure.kind).inc()
            if failure.kind in (RunFinished.reason, TicketNotFound.reason):
                self._finished.look_soon()
            if failure.kind not in _NOBODYS_FAULT:
                self._leave_out(task.run, surely=failure.kind == FAULT.reason)
            reason = f"{failure.kind}: {failure.public_text}"
            await self._withdrawals.withdraw(task.ticket, reason, task.run, task.round, log)
            if isinstance(failure.error, IdentityInvalid):  # of a relay, which is no more use until a person acts
                raise failure.error
            await self._setback.pause()

    async def _send_again(self, task: pb.TrainingTask, log: Log) -> None:
        """Makes an update pending that the server has lost since its receipt.

        Raises:
            StateInvalid: If it is not here any more; it is in the residual then.
        """
        if await asyncio.to_thread(self._outbox.recall, task.run):
            log.warning("the server lost the update of this ticket; it is sent again", ticket=task.ticket)
            return
        await asyncio.to_thread(self._outbox.take_back, task.run, faulty=False)
        raise StateInvalid("the update that the server lost is not here any more; it goes into the residual")

    def _against(self, task: pb.TrainingTask) -> Reason | None:
        """Returns why a ticket is refused as it stands: it asks for more than the policy allows, or at a wrong time."""
        if task.run in self._holds.held():  # a server that does not know what it is to leave a run out
            return Reason.of(TrainingFailed("this site leaves the run out for a while, because work for it fails"))
        verdict = self._verdicts.verdicts.get(task.run)
        if verdict is None or verdict.run is None:
            return None  # it was not accepted, which is said where the adapter is pulled
        run, taken = verdict.run, len(self._egress_log.tickets(task.run) - {task.ticket})
        examples = None if run.of_sums else verdict.examples  # those of many clients, each with steps of its own
        for reason in reasons_against_ticket(self._policy, run, task, examples, taken):
            return reason
        stop = self._limits.against(message_entries.largest_update(run, task.round))
        return Reason.of(RefusedByPolicy(stop.text)) if stop else None

    async def _evaluate(self, task: pb.EvaluationTask) -> None:
        log = self._log.bind(run=task.run)

        async def evaluate() -> None:
            run, held = await self._pull(task.run, task.version, task.version)
            with self._metrics.during(State.EVALUATING), tracing.span("evaluate", task.run, task.version):
                await self._limits.while_permitted(self._evaluator.evaluate(run, held, log))

        failure = await self._tried(task.run, evaluate)
        if failure is None:
            self._attempts.forget((task.run, task.version))
            self._holds.succeeded(task.run)
            return
        is_fault = failure.kind not in _NOBODYS_FAULT
        (log.error if is_fault else log.warning)(
            "version is not scored", version=task.version, cause=failure.local_text
        )
        if is_fault:
            await self._cannot_score(task, failure, log)
        await self._setback.pause()

    async def _cannot_score(self, task: pb.EvaluationTask, failure: Reason, log: Log) -> None:
        """Counts a failed attempt at a version; after the last one it is given up, and the other versions go on."""
        key = task.run, task.version
        if isinstance(failure.error, StateInvalid):  # this site's disk, and nothing that the version can help
            self._leave_out(task.run, surely=True)
            return
        attempts = self._attempts.failed(key)
        if failure.kind == FAULT.reason:
            self._leave_out(task.run, surely=True)
        if attempts < EVALUATIONS and not isinstance(failure.error, InvalidArgument):
            return
        self._attempts.forget(key)
        log.error("version is given up; the others go on", version=task.version, attempts=attempts)
        self._metrics.evaluations_given_up.labels(task.run).inc()
        try:
            await self._evaluator.give_up(task.run, task.version, f"{failure.kind}: {failure.public_text}")
        except (LocalError, *NOT_ABOUT_THE_TASK):
            raise
        except FedpeftError as error:
            log.error("the server could not be told", version=task.version, cause=str(error))
            self._leave_out(task.run, surely=True)

    def _leave_out(self, run: str, *, surely: bool) -> None:
        """Counts a failure of a run, so that this site works for others if it fails again and again."""
        if seconds := self._holds.failed(run, surely=surely):
            self._log.warning("run is skipped for a while because its work keeps failing", run=run, seconds=seconds)
            self._metrics.left_out.labels(run).inc()

    async def _tried(self, run: str, work: Callable[[], Awaitable[None]]) -> Reason | None:
        """Does the work of a task; declines the run, and with it the task, if it shows that the run does not suit.

        Returns:
            Cause of a failure of another kind; the next attempt may do better.
        """
        try:
            await work()
        except NOT_ABOUT_THE_TASK:
            raise
        except UNFIT as error:
            await self._say(run, self._verdicts.condemn(run, Reason.of(error)))
        except (FedpeftError, OSError) as error:
            return Reason.of(self._named(error))
        else:
            self._setback.reset()
            self._pace.worked()
        return None

    async def _pull(self, run_id: str, version: int, number: int) -> tuple[KnownRun, CachedAdapter]:
        """Returns a run that this site accepted, and an adapter version of it on disk; `number` is its round.

        Raises:
            _NotAccepted: If this process did not accept the run.
        """
        verdict = self._verdicts.verdicts.get(run_id)
        if verdict is None or verdict.run is None or not verdict.is_eligible:
            raise _NotAccepted(f"the server gave work for run {run_id}, which this client did not accept")
        cache = AdapterCache(self._directory.run(run_id))
        with self._metrics.during(State.PULLING), tracing.span("pull", run_id, number):
            held = await Puller(self._channel, self._retry, verdict.run, cache).pull(version)
        return verdict.run, held

    def _named(self, error: FedpeftError | OSError) -> FedpeftError:
        if isinstance(error, FedpeftError):
            return error
        return StateInvalid(f"cannot use state directory {self._directory.path}: {durable.in_words(error)}")


def registration(settings: Settings, hello: Answer) -> pb.RegisterRequest:
    """Returns what a client says of itself.

    Args:
        settings: The client's settings.
        hello: First message of the client's worker.
    """
    return pb.RegisterRequest(
        min_protocol=PROTOCOL,
        max_protocol=PROTOCOL,
        role=pb.CLIENT_ROLE_EVALUATOR if settings.evaluate else pb.CLIENT_ROLE_TRAINER,
        run=settings.run or "",
        dry_run=settings.dry_run,
        capabilities=pb.Capabilities(
            software=f"fedpeft {installed_version('fedpeft')}"
            + (f", torch {hello['torch']}" if hello["torch"] else ""),
            methods=hello["methods"],
            encodings=codecs.names(),
            device=hello["device"],
            examples=hello["rows"],
        ),
    )
