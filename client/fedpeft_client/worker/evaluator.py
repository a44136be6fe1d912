"""Scoring of an adapter version on held-out data."""

from __future__ import annotations

from fedpeft.process.logs import Log
from fedpeft.rounds import metric_values
from fedpeft.untrusted_text import MAX_REASON
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state.adapters import CachedAdapter
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.worker.handle import WorkerProcess
from fedpeft_client.worker.reporter import Reporter
from fedpeft_client.worker.trainer import adapter_json, sendable


class Evaluator:
    """Scores in the worker and reports."""

    def __init__(
        self, channel: Channel, retry: Retry, worker: WorkerProcess, egress_log: EgressLog, metrics: Metrics
    ) -> None:
        self._channel = channel
        self._retry = retry
        self._worker = worker
        self._egress_log = egress_log
        self._metrics = metrics

    async def give_up(self, run: str, version: int, reason: str) -> None:
        """Tells the server that a version cannot be scored here, so that it gives the others.

        Raises:
            FedpeftError: If the server does not take that.
        """
        message = pb.PushEvaluationRequest(run=run, version=version, failure=reason[:MAX_REASON])
        with self._egress_log.record(message_entries.evaluation(message)):
            await self._retry.call(lambda: self._channel.push_evaluation(message))

    async def evaluate(self, run: KnownRun, held: CachedAdapter, log: Log) -> None:
        """Scores a version on this site's data and pushes the figures.

        Raises:
            DataInvalid: If too many images cannot be read.
            TrainingFailed: If the worker died of it.
            NotFound: If the run or the version is gone.
            MetricsInvalid: If the server does not take the figures.
        """
        log.info("evaluation begins", version=held.version)
        request = {"op": "evaluate", "run": run.as_json(), "adapter": adapter_json(held)}
        answer = await self._worker.ask(request, Reporter(log, "evaluating", self._worker.timing))
        metrics = sendable(answer["metrics"], metric_values.MAX_EVALUATION, log)
        message = pb.PushEvaluationRequest(run=run.id, version=held.version, metrics=metrics)
        with self._egress_log.record(message_entries.evaluation(message)):
            await self._retry.call(lambda: self._channel.push_evaluation(message))
        self._metrics.scored(run.id, metrics)
        whole = {name: value for name, value in metrics.items() if "/" not in name}
        log.info("evaluated", version=held.version, **whole)
