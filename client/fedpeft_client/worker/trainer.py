"""Training for a ticket: the worker trains and writes a draft, which becomes the pending update in one rename."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from google.protobuf import json_format

from fedpeft.process.logs import Log
from fedpeft.rounds import metric_values
from fedpeft.rounds.acceptance import check_tensors
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import tensor_pb2
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state import state_dir
from fedpeft_client.state.adapters import CachedAdapter
from fedpeft_client.state.outbox import Outbox, Pending
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.training_progress import TrainingProgress
from fedpeft_client.uplink.wire_checks import deadline
from fedpeft_client.worker.handle import Answer, OnProgress, WorkerProcess
from fedpeft_client.worker.reporter import Reporter


class Trainer:
    """Trains in the worker and keeps what came of it."""

    def __init__(self, directory: StateDirectory, outbox: Outbox, worker: WorkerProcess, metrics: Metrics) -> None:
        self._directory = directory
        self._outbox = outbox
        self._worker = worker
        self._metrics = metrics

    async def train(
        self, run: KnownRun, task: pb.TrainingTask, held: CachedAdapter, log: Log, progress: TrainingProgress
    ) -> Pending:
        """Trains for a ticket and returns the update, on disk for good; `progress` is kept up to date.

        Raises:
            TrainingFailed: If training ended without an update.
            DataInvalid: If too many images cannot be read.
            StateInvalid: If the state directory cannot be written.
            ManifestInvalid: If the update holds anything but the tensors that the run was accepted with.
        """
        log.info("training begins", version=task.version, ticket=task.ticket, deadline=deadline(task))
        draft = await asyncio.to_thread(self._outbox.draft)
        folder = self._directory.run(run.id)
        request: Answer = {
            "op": "train",
            "run": run.as_json(),
            "round": task.round,
            "seed": task.seed,
            "settings": wire.training_data(task.settings),
            "adapter": adapter_json(held),
            "state": {group: str(file) for group, file in state_dir.groups(folder).items()},
            "out": str(draft),
        }
        report = Reporter(log, "training", self._worker.timing)
        answer = await self._worker.ask(request, self._watch(run.id, report, progress))
        manifest = json_format.ParseDict(answer["manifest"], tensor_pb2.Manifest())
        check_tensors(wire.manifest_from_proto(manifest), task.round, run.config, run.spec)  # nothing else ever leaves
        header = pb.UpdateHeader(
            ticket=task.ticket,
            manifest=manifest,
            examples=answer["examples"],
            metrics=sendable(answer["metrics"], metric_values.MAX_TRAINING, log),
        )
        pending = await asyncio.to_thread(self._outbox.commit, run.id, task.round, header)
        self._metrics.trained(run.id, header.metrics)
        log.info("trained", **{**answer["facts"], **header.metrics, "examples": header.examples})
        return pending

    def _watch(self, run: str, report: Reporter, progress: TrainingProgress) -> OnProgress:
        def watch(answer: Answer) -> None:
            report(answer)
            progress.take(answer)
            self._metrics.progressed(run, answer)

        return watch


def sendable(measured: Mapping[str, float], most: int, log: Log) -> dict[str, float]:
    """Returns the figures that the server takes; logs how many are left out, and why the first are."""
    kept, dropped = metric_values.sendable(measured, most)
    if dropped:
        log.warning(
            "figures are not sent", dropped=len(dropped), cause="; ".join(dropped[: metric_values.FAULTS_NAMED])
        )
    return kept


def adapter_json(held: CachedAdapter) -> Answer:
    """Returns where the worker finds an adapter version."""
    return {
        "payload": str(held.payload),
        "manifest": json_format.MessageToDict(wire.manifest_to_proto(held.manifest)),
    }
