"""The composition root: puts settings, state directory, channel, worker and agent together, and ends them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime

from fedpeft.identity.folder import Identity
from fedpeft.process import logs
from fedpeft.process.addresses import Address
from fedpeft.process.logs import Log
from fedpeft.process.race import first_of
from fedpeft.process.tracing import traced
from fedpeft_client.agent import Agent
from fedpeft_client.commands.dry_run import dry_run
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.enrolment.renewal import Renewal, check_valid, until
from fedpeft_client.error_policy import NOT_LET_IN
from fedpeft_client.owner.limits import Limits
from fedpeft_client.owner.machine import MachineCollector
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.owner.policy import Policy, find, note_named
from fedpeft_client.settings import Settings
from fedpeft_client.state import contact
from fedpeft_client.state.contact import Contact
from fedpeft_client.state.processes import Processes
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.traffic import Traffic
from fedpeft_client.worker.handle import Answer, WorkerProcess


def serve(settings: Settings) -> None:
    """Runs the client until it is done or a signal asks it to stop.

    Raises:
        FedpeftError: What ended it otherwise.
    """
    logs.configure(settings.log_format, "debug" if settings.verbose else "info")
    policy, file = find(settings.policy, settings.state_dir)
    log = logs.logger(client=settings.name)
    if file is not None:
        log.info("the policy of this site applies", file=str(file), **policy.rules)
    with StateDirectory(settings.state_dir) as directory, traced(settings.traces, "fedpeft-client", settings.name):
        note_named(file, directory.path)
        try:
            asyncio.run(_serve(settings, policy, directory, _identity(settings, log), log))
        except NOT_LET_IN as error:
            contact.note_refusal(directory.path, error.message)
            raise


def _identity(settings: Settings, log: Log) -> Identity | None:
    """Returns who this client is; None where plain text is spoken, which is said aloud if it leaves the machine.

    Raises:
        CertificateExpired: If the certificate has ended.
    """
    if settings.identity is None:
        if not Address.parse(settings.server).is_loopback:
            log.warning(
                "plain text: anyone on the network path can read and change what is sent", server=settings.server
            )
        return None
    identity = Identity.load(settings.identity)
    check_valid(identity, datetime.now(UTC))
    log.info("enrolled", server=identity.server, role=str(identity.subject.role), until=until(identity))
    return identity


async def _serve(
    settings: Settings, policy: Policy, directory: StateDirectory, identity: Identity | None, log: Log
) -> None:
    worker, metrics = WorkerProcess(_worker_options(settings, policy), log, TIMING), Metrics()
    metrics.registry.register(MachineCollector(lambda: str(worker.hello.get("gpu", ""))))
    with (
        EgressLog(directory.path, settings.server) as egress_log,
        metrics.served("" if settings.dry_run else settings.metrics),
    ):
        if egress_log.unreadable:
            log.warning(
                "the ledger has lines that cannot be read; the bytes of the last 24 hours may be more than it counts",
                lines=egress_log.unreadable,
                egress_log=str(egress_log.path),
            )
        try:
            async with Channel(settings.server, settings.name, directory.instance, identity, TIMING) as channel:
                Traffic(channel, egress_log, metrics, Contact(directory.path, settings.server, TIMING))
                if settings.dry_run:
                    against = Limits(policy, egress_log, metrics, log).against()
                    processes = Processes(directory.path, channel.process)
                    work = dry_run(settings, channel, worker, egress_log, processes, against, log)
                else:
                    work = Agent(settings, policy, directory, channel, worker, egress_log, metrics, log).live()
                    if identity is not None:
                        work = first_of(work, Renewal(identity, channel, log).run())
                await _until_stopped(work, log)
        finally:
            await worker.close()


async def _until_stopped(work: Coroutine[None, None, None], log: Log) -> None:
    """Runs the work until it is done or SIGTERM or SIGINT comes; a second SIGINT ends the process at once."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    stopped = False

    def stop(name: str) -> None:
        nonlocal stopped
        stopped = True
        log.info("stopping; unfinished work continues at the next start", signal=name)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(each)
        task.cancel()

    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop, each.name)
    with suppress(asyncio.CancelledError):
        await task
    if task.cancelled() and not stopped:
        raise asyncio.CancelledError


def _worker_options(settings: Settings, policy: Policy) -> Answer:
    return {
        "op": "open",
        "data": _path(settings.data),
        "relay": None if settings.relaying is None else settings.relaying.as_json(),
        "reading": {
            "image_column": settings.image_column,
            "label_column": settings.label_column,
            "max_image_pixels": settings.max_image_pixels,
        },
        "label_map": _path(settings.label_map),
        "weights": _path(settings.weights),
        "device": settings.device,
        "threads": settings.threads,
        "rank": settings.rank,
        "checkpointing": settings.checkpointing,
        "log_format": settings.log_format,
        "verbose": settings.verbose,
        "client": settings.name,
        "evaluate": settings.evaluate,
        "policy": policy.model_dump(mode="json", exclude_defaults=True),
    }


def _path(path: object | None) -> str | None:
    return None if path is None else str(path)
