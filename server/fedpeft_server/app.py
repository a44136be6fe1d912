"""The daemon: its life from start to end."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import structlog
from grpc_health.v1 import health_pb2

from fedpeft import __version__
from fedpeft.errors import StateInvalid
from fedpeft.process import durable, locks
from fedpeft.process.addresses import Address
from fedpeft.process.tracing import traced
from fedpeft_server.backups import folders
from fedpeft_server.parts import Parts, build
from fedpeft_server.settings import Settings
from fedpeft_server.startup_checks import tell_lost_versions
from fedpeft_server.store.connection import note_place, refuse_to_forget, sole_use
from fedpeft_server.store.rows import SERVER, AuditEvent
from fedpeft_server.timing import Timing
from fedpeft_server.upkeep import Upkeep

log = structlog.get_logger()

R = TypeVar("R")

FEW_FILES = 1024
"""With a lower limit of open files the server warns at its start."""


class EndedAtStart(Exception):
    """The daemon was told to stop before it could serve."""


async def run(settings: Settings, timing: Timing) -> None:
    """Lives until it is told to stop.

    Args:
        settings: Settings of the daemon.
        timing: Its durations.

    Raises:
        FedpeftError: As `serving`.
    """
    with suppress(EndedAtStart):
        async with serving(settings, timing) as parts:
            await parts.stopping.wait()


@asynccontextmanager
async def serving(settings: Settings, timing: Timing) -> AsyncIterator[Parts]:
    """Serves on a data folder while the block lasts: builds the parts, takes up every run, serves; drains and closes.

    Each part is closed, whatever the closing of another comes to, and likewise where the start fails.

    Args:
        settings: Settings of the daemon.
        timing: Its durations.

    Raises:
        SettingsInvalid: If a port cannot be had, or another setting is wrong.
        StateInvalid: If data folder or database cannot be used, or another server holds one of them.
        EndedAtStart: If it is told to stop before it has all parts.
        Internal: At the end, if background work could not go on.
    """
    stopping = asyncio.Event()
    traces = traced(settings.traces, "fedpeft-server", settings.listen)
    with _locked(settings), traces, _signals(stopping):
        async with AsyncExitStack() as stack:
            _allow_open_files()
            parts = await _unless_ended(build(settings, timing, stopping, stack), stopping)
            if parts is None:
                log.info("stopped before it served")
                raise EndedAtStart
            note_place(settings.data_dir, settings.database)  # which could be opened
            _end_with(stack, parts)
            try:
                await _unless_ended(_take_up(parts), stopping)
            finally:  # also where that failed: gRPC frees a port only of a server that was started
                await asyncio.gather(parts.ports.listening.start(), parts.ports.enrolling.start())
            if stopping.is_set():
                await _stop_servers(parts, 0.0)  # what was not taken up is not served
            else:
                _say_serving(parts)
            yield parts
        log.info("stopped")
    if parts.background.fault:
        raise parts.background.fault


async def _unless_ended(work: Coroutine[Any, Any, R], stopping: asyncio.Event) -> R | None:
    """Returns the result of work of the start, which may wait for a bucket; None as soon as the daemon is to end."""
    working, ending = asyncio.create_task(work), asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        ending.cancel()
        working.cancel()
        await asyncio.wait({working})


async def _take_up(parts: Parts) -> None:
    """Takes up every run where the last process left it, and begins the upkeep."""
    store, runs = parts.store, parts.runs
    await store.set_clock()
    await tell_lost_versions(store, parts.timing.store_answer_s)
    await runs.start()
    for evaluator in parts.sessions.evaluators():
        for run_id in runs.participation.accepted_by(evaluator):
            runs.scoring.takes_part(run_id, evaluator)
    await store.transact(store.db.transactions.write, AuditEvent(SERVER, "server.started", __version__))
    Upkeep(parts).begin()


def _say_serving(parts: Parts) -> None:
    settings, ports = parts.settings, parts.ports
    parts.background.changed.set()
    log.info(
        "serving",
        version=__version__,
        listen=str(Address(Address.parse(settings.listen, free=True).host, ports.port)),
        security="TLS 1.3" if parts.certificates else "none",
        enroll=ports.enroll_address or "nowhere",
        metrics=settings.metrics,
        data=str(settings.data_dir),
        runs=len(parts.runs.all()),
    )


def _end_with(stack: AsyncExitStack, parts: Parts) -> None:
    """Has the end begin with this: what only waits is ended, and transfers under way are let finish for a stated time.

    Waits for a round, a turn or news would hold the end up though nobody is at work.
    """
    stack.push_async_callback(_stop_servers, parts, parts.settings.drain_s)
    if parts.store.db.is_shared:
        stack.push_async_callback(parts.presence.leave)
    for end_waits in (parts.downloads.close, parts.uploads.drain, parts.admission.drain, parts.runs.drain):
        stack.callback(end_waits)
    stack.push_async_callback(parts.health.set, "", health_pb2.HealthCheckResponse.NOT_SERVING)
    stack.callback(log.info, "draining", seconds=parts.settings.drain_s)


async def _stop_servers(parts: Parts, seconds: float) -> None:
    servers = parts.ports.listening, parts.ports.enrolling
    await asyncio.gather(*(server.stop(seconds) for server in servers))


@contextmanager
def _signals(stopping: asyncio.Event) -> Iterator[None]:
    """SIGTERM and SIGINT end the daemon once; a second one ends the process."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        loop.remove_signal_handler(number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _allow_open_files() -> None:
    """Raises the limit on open files as far as it goes: every connection takes one, and every transfer another."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < FEW_FILES:
        log.warning(
            "the limit of open files is low: half of them are for connections",
            files=most,
            connections=most // 2,
            cure=f"ulimit -n {FEW_FILES}, or LimitNOFILE= of systemd",
        )


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """Holds the data folder for this process, and the database where that is SQLite's.

    Raises:
        StateInvalid: If the folder cannot be made or written, or is a backup, or if another server holds one of them.
        SettingsInvalid: If its server's database is elsewhere, and is not named.
    """
    folder = settings.data_dir
    try:
        durable.make_folder(folder, 0o700)  # updates are nobody else's to read
    except OSError as error:
        raise StateInvalid(f"--data-dir {folder}: {error.strerror}; name a folder this user can write") from None
    folders.refuse_to_serve(folder)
    refuse_to_forget(folder, settings.database)
    with locks.directory(folder, f"--data-dir {folder}", "server", "name another folder"):
        durable.sweep(folder)
        with sole_use(settings.database_url):
            yield
