"""Scoring of an adapter version on held-out data."""

from __future__ import annotations

from fedpeft import figures
from fedpeft.logs import Log
from fedpeft.plain_text import MAX_REASON
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client import departures
from fedpeft_client.adapters import Held
from fedpeft_client.channel import Channel
from fedpeft_client.ledger import Ledger
from fedpeft_client.metrics import Metrics
from fedpeft_client.patience import Patience
from fedpeft_client.runs import KnownRun
from fedpeft_client.trainer import adapter_json, sendable
from fedpeft_client.worker_process import WorkerProcess


class Evaluator:
    """Scores in the worker and reports."""

    def __init__(
        self, channel: Channel, patience: Patience, worker: WorkerProcess, ledger: Ledger, metrics: Metrics
    ) -> None:
        self._channel = channel
        self._patience = patience
        self._worker = worker
        self._ledger = ledger
        self._metrics = metrics

    async def give_up(self, run: str, version: int, reason: str) -> None:
        """Tells the server that a version cannot be scored here, so that it gives the others.

        Raises:
            FedpeftError: If the server does not take that.
        """
        message = pb.PushEvaluationRequest(run=run, version=version, failure=reason[:MAX_REASON])
        with self._ledger.booked(departures.evaluation(message)):
            await self._patience.keep(lambda: self._channel.push_evaluation(message))

    async def evaluate(self, run: KnownRun, held: Held, log: Log) -> None:
        """Scores a version on this site's data and pushes the figures.

        Raises:
            DataInvalid: If too many images cannot be read.
            TrainingFailed: If the worker died of it.
            NotFound: If the run or the version is gone.
            MetricsInvalid: If the server does not take the figures.
        """
        log.info("evaluation begins", version=held.version)
        request = {"op": "evaluate", "run": run.as_json(), "adapter": adapter_json(held)}
        answer = await self._worker.ask(request)
        metrics = sendable(answer["metrics"], figures.MAX_EVALUATION, log)
        message = pb.PushEvaluationRequest(run=run.id, version=held.version, metrics=metrics)
        with self._ledger.booked(departures.evaluation(message)):
            await self._patience.keep(lambda: self._channel.push_evaluation(message))
        self._metrics.scored(run.id, metrics)
        whole = {name: value for name, value in metrics.items() if "/" not in name}
        log.info("evaluated", version=held.version, **whole)
