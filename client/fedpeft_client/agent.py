"""The agent's life: register, push what is pending, prove, then await a round, pull, train, push, again and again.

An evaluator's is the same with scoring in place of training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version

from fedpeft import PROTOCOL
from fedpeft.codecs import codecs
from fedpeft.errors import (
    ClientIdInUse,
    ClientIdInvalid,
    DataInvalid,
    FedpeftError,
    Internal,
    ModelInvalid,
    NotRegistered,
    ProtocolMismatch,
    RunNotFound,
    StateInvalid,
    Unavailable,
)
from fedpeft.logs import Log
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.adapters import AdapterCache
from fedpeft_client.channel import Channel
from fedpeft_client.evaluator import Evaluator
from fedpeft_client.exits import UNFIT
from fedpeft_client.fitness import Fitness
from fedpeft_client.patience import AWAY_S, CALL_S, Backoff, Patience
from fedpeft_client.pending import Pending, PendingBox
from fedpeft_client.pull import Puller
from fedpeft_client.push import Pusher
from fedpeft_client.runs import KnownRun
from fedpeft_client.settings import Settings
from fedpeft_client.state import StateDirectory
from fedpeft_client.trainer import Trainer
from fedpeft_client.worker_process import Answer, WorkerProcess

_NOT_ABOUT_THE_TASK = (
    ClientIdInUse,
    ClientIdInvalid,
    Internal,
    NotRegistered,
    ProtocolMismatch,
    Unavailable,
)
_PRIVATE = (DataInvalid, ModelInvalid, StateInvalid)
"""Errors whose sentence may name files of this site; the server gets to know the kind only."""


class Agent:
    """One client, from its first call to its last.

    Args:
        settings: What it was told.
        directory: Its memory, held by this process.
        channel: The server.
        worker: The process that computes.
        log: Carries the client's id.

    Attributes:
        runs: The runs it has heard of, by id.
        fitness: The verdicts on them.
    """

    def __init__(
        self,
        settings: Settings,
        directory: StateDirectory,
        channel: Channel,
        worker: WorkerProcess,
        log: Log,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._channel = channel
        self._worker = worker
        self._log = log
        self._box = PendingBox(directory)
        self._patience = Patience(log, CALL_S if settings.once or settings.dry_run else None)
        self._pusher = Pusher(channel, self._patience)
        self._trainer = Trainer(directory, self._box, worker)
        self._evaluator = Evaluator(channel, self._patience, worker)
        self._setback = Backoff()
        self._registered_once = False
        self.fitness = Fitness(worker, log)
        self.runs: dict[str, KnownRun] = {}

    async def live(self) -> None:
        """Takes part until there is nothing left to do (`--once`), for ever otherwise.

        Raises:
            FedpeftError: What nothing but a person can mend.
        """
        await self.register()
        if self._settings.once:
            self._patience.give_up_s = AWAY_S
        await self.push_pending()
        await self.prove_runs()
        while await self.take_part():
            await self.push_pending()

    async def register(self, run: str | None = None) -> Answer:
        """Announces this client and learns of the runs.

        Args:
            run: The run to hear of, finished or not; what the settings say if absent.

        Returns:
            What the worker, which is started first, said of itself.
        """
        hello = await self._worker.start()
        evaluates = self._settings.evaluate
        request = pb.RegisterRequest(
            min_protocol=PROTOCOL,
            max_protocol=PROTOCOL,
            role=pb.CLIENT_ROLE_EVALUATOR if evaluates else pb.CLIENT_ROLE_TRAINER,
            run=run or self._settings.run or "",
            capabilities=pb.Capabilities(
                software=f"fedpeft {installed_version('fedpeft')}, torch {hello['torch']}",
                methods=hello["methods"],
                encodings=codecs.names(),
                device=hello["device"],
                examples=self.fitness.examples,
            ),
        )
        response = await self._patience.keep(lambda: self._channel.register(request))
        for message in response.runs:
            self._learn(message)
        say = self._log.debug if self._registered_once else self._log.info
        self._registered_once = True
        say(
            "registered",
            server=self._settings.server,
            runs=[message.id for message in response.runs],
            device=hello["device"],
            threads=hello["threads"],
        )
        return hello

    async def push_pending(self) -> None:
        """Uploads the update that an earlier process, or an interrupted push, left behind; it is not trained again."""
        await asyncio.to_thread(self._box.finish)
        try:
            pending = await asyncio.to_thread(self._box.load)
        except StateInvalid as error:
            self._log.error("pending update is dropped, its ticket trained again", cause=str(error))
            self._box.discard()
            return
        if pending is not None:
            await self._on_good_terms(lambda: self._push(pending))

    async def prove_runs(self) -> None:
        """Proves every run there is, so that a misfit shows before the first ticket and not after it."""
        for run in list(self.runs.values()):
            if not run.finished:
                try:
                    await self.fitness.prove(run)
                except UNFIT as error:
                    self._judge(run.id, error)
        if self.fitness.examples:
            await self.register()  # now with the number of examples

    async def take_part(self) -> bool:
        """Awaits one task and does it; returns False once there is nothing left to do."""
        return await self._on_good_terms(self._take_part) is not False

    async def _take_part(self) -> bool:
        wanted = self._settings.run or ""
        response = await self._patience.keep(lambda: self._channel.await_round(wanted))
        match response.WhichOneof("outcome"):
            case "training":
                await self._train(response.training)
            case "evaluation":
                await self._evaluate(response.evaluation)
            case _:
                self._log.debug("waiting", reason=response.idle.reason)
                return not (response.idle.finished and self._settings.once)
        return True

    async def _on_good_terms(self, step: Callable[[], Awaitable[bool | None]]) -> bool | None:
        """Takes a step; registers again if the server does not know this client any more."""
        try:
            return await step()
        except NotRegistered:
            self._log.info("the server does not know this client any more; registering again")
            await self.register()
            return True

    async def _train(self, task: pb.TrainingTask) -> None:
        log = self._log.bind(run=task.run, round=task.round)
        try:
            run = await self._known(task.run)
            await self.fitness.prove(run)
            held = await self._puller(run).pull(task.version)
            pending = await self._trainer.train(run, task, held, log)
        except _NOT_ABOUT_THE_TASK:
            raise
        except (FedpeftError, OSError) as error:
            cause = self._named(error)
            log.error("ticket is given up", cause=str(cause))
            await self._withdraw(task.ticket, cause)
            await self._overcome(task.run, cause)
        else:
            await self._push(pending)
            self._setback.reset()

    async def _evaluate(self, task: pb.EvaluationTask) -> None:
        log = self._log.bind(run=task.run)
        try:
            run = await self._known(task.run)
            await self.fitness.prove(run)
            held = await self._puller(run).pull(task.version)
            await self._evaluator.evaluate(run, held, log)
        except _NOT_ABOUT_THE_TASK:
            raise
        except (FedpeftError, OSError) as error:
            cause = self._named(error)
            log.error("version is not scored", version=task.version, cause=str(cause))
            await self._overcome(task.run, cause)
        else:
            self._setback.reset()

    async def _push(self, pending: Pending) -> None:
        log = self._log.bind(run=pending.run, round=pending.round)
        outcome = await self._pusher.push(pending, log)
        await asyncio.to_thread(self._box.settle, pending, outcome)

    async def _withdraw(self, ticket: str, cause: FedpeftError) -> None:
        said = (type(cause).__doc__ or "").strip() if isinstance(cause, _PRIVATE) else str(cause)
        reason = f"{cause.reason}: {said}"
        try:
            await self._patience.keep(lambda: self._channel.withdraw(ticket, reason))
        except _NOT_ABOUT_THE_TASK:
            raise
        except FedpeftError as error:
            self._log.info("the ticket is gone already", ticket=ticket, cause=str(error))

    async def _overcome(self, run: str, error: FedpeftError) -> None:
        """Judges a run that this site does not fit; pauses after any failure, lest it is repeated without a break."""
        if isinstance(error, UNFIT):
            self._judge(run, error)
        await self._setback.pause()

    def _learn(self, message: run_pb2.Run) -> None:
        try:
            self.runs[message.id] = KnownRun.of(message)
        except UNFIT as error:
            self._judge(message.id, error)

    def _judge(self, run: str, error: FedpeftError) -> None:
        """Ends a client that was started for this run; any other goes on with the other runs."""
        self.fitness.condemn(run, error)
        if self._settings.once or self._settings.run:
            raise error
        self._log.error("this site cannot work for the run", run=run, cause=str(error))

    async def _known(self, run: str) -> KnownRun:
        self.fitness.refuse_condemned(run)
        if run not in self.runs:
            await self.register(run)  # by name, because finished runs, which evaluators may score, are not listed
            await self.register()
        if run not in self.runs:
            raise RunNotFound(f"the server gave work for run {run} but does not list it")
        return self.runs[run]

    def _puller(self, run: KnownRun) -> Puller:
        cache = AdapterCache(self._directory.run(run.id))
        return Puller(self._channel, self._patience, run, cache)

    def _named(self, error: FedpeftError | OSError) -> FedpeftError:
        if isinstance(error, FedpeftError):
            return error
        return StateInvalid(f"cannot use state directory {self._directory.path}: {error.strerror}")
