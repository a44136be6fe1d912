"""The composition root: puts settings, state directory, channel, worker and agent together, and ends them in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from contextlib import suppress

from fedpeft import logs
from fedpeft.logs import Log
from fedpeft_client.agent import Agent
from fedpeft_client.channel import Channel
from fedpeft_client.dry_run import dry_run
from fedpeft_client.ledger import Ledger
from fedpeft_client.policy import Policy, find
from fedpeft_client.settings import Settings
from fedpeft_client.state import StateDirectory
from fedpeft_client.worker_process import Answer, WorkerProcess


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
    with StateDirectory(settings.state_dir) as directory:
        asyncio.run(_serve(settings, policy, directory, log))


async def _serve(settings: Settings, policy: Policy, directory: StateDirectory, log: Log) -> None:
    worker, ledger = WorkerProcess(_worker_options(settings, policy), log), Ledger(directory.path, settings.server)
    try:
        async with Channel(settings.server, settings.name, directory.instance) as channel:
            if settings.dry_run:
                work = dry_run(settings, channel, worker, ledger, log)
            else:
                work = Agent(settings, policy, directory, channel, worker, ledger, log).live()
            await _until_stopped(work, log)
    finally:
        await worker.close()
        ledger.close()


async def _until_stopped(work: Coroutine[None, None, None], log: Log) -> None:
    """Runs the work until it is done or SIGTERM or SIGINT comes; a second SIGINT ends the process at once."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    stopped = False

    def stop(name: str) -> None:
        nonlocal stopped
        stopped = True
        log.info("stopping; what was begun is continued at the next start", signal=name)
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
        "data": str(settings.data),
        "label_map": _path(settings.label_map),
        "weights": _path(settings.weights),
        "device": settings.device,
        "threads": settings.threads,
        "log_format": settings.log_format,
        "verbose": settings.verbose,
        "client": settings.name,
        "evaluate": settings.evaluate,
        "policy": policy.model_dump(mode="json", exclude_defaults=True),
    }


def _path(path: object | None) -> str | None:
    return None if path is None else str(path)
