"""The daemon: its life from start to end, and the one module that knows all parts."""

from __future__ import annotations

import asyncio
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedpeft import __version__
from fedpeft.errors import FedpeftError, SettingsInvalid, StateInvalid
from fedpeft.identity import certificates
from fedpeft.process import durable, locks
from fedpeft.process.addresses import Address
from fedpeft.process.tracing import traced
from fedpeft.v1 import (
    access_service_pb2,
    access_service_pb2_grpc,
    federation_service_pb2,
    federation_service_pb2_grpc,
    operator_service_pb2,
    operator_service_pb2_grpc,
)
from fedpeft_server.access import bounds
from fedpeft_server.access.admission import Admission
from fedpeft_server.access.certificates import ServerCertificates
from fedpeft_server.background import Background
from fedpeft_server.enrolment import supervisor as enrolment
from fedpeft_server.enrolment.supervisor import Enrolment
from fedpeft_server.metrics import Metrics
from fedpeft_server.rpc import connections
from fedpeft_server.rpc.access import Access, Addresses
from fedpeft_server.rpc.caller_log import CallerLog
from fedpeft_server.rpc.federation import Federation
from fedpeft_server.rpc.health import Health
from fedpeft_server.rpc.interceptors import Gate
from fedpeft_server.rpc.operator import Operator
from fedpeft_server.rpc.sessions import Sessions
from fedpeft_server.runs.progress import TIMING, Timing
from fedpeft_server.runs.progress_watch import ProgressWatch
from fedpeft_server.runs.runs import Runs
from fedpeft_server.settings import Settings
from fedpeft_server.startup_checks import refuse_lost_certificates, tell_lost_versions
from fedpeft_server.store.rows import AuditEvent
from fedpeft_server.store.store import Store
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.uploads.pipeline import Uploads
from fedpeft_server.uploads.transfer_slots import TransferSlots

log = structlog.get_logger()

BOOK_S = 5.0
"""Interval at which traffic and presence are written to the database between rounds, seconds."""

MOVED_S = 0.5
"""Delay of writing traffic after a payload moved, seconds; more may move meanwhile, and is written with it."""

PAUSE_S = 5.0
"""Pause after a failure to keep a process for enrolment, seconds."""

PROBE_S = 5.0
"""Interval at which the database is tried, seconds, so that health checks know whether it can be used."""

CLEAN_S = 60.0
"""Interval at which the removal of files that could not be removed is tried again, seconds."""

MEASURE_S = 60.0
"""Interval at which stored bytes are measured, seconds."""

LOOK_S = 60.0
"""Interval at which the server's certificate is looked at, seconds."""

FEW_FILES = 1024
"""With a lower limit of open files the server warns at its start."""
FILES_S = 1.0
"""Interval at which its files are looked at, seconds: a command that replaced one is followed by others at once."""

TOKENS_KEPT_S = 30 * 86_400.0
"""An enrolment token is listed for so long after it expired; the audit log knows of it for ever."""
PURGE_S = 86_400.0
"""Interval at which those are looked for, seconds."""

SERVICES = (
    access_service_pb2.DESCRIPTOR.services_by_name["AccessService"].full_name,
    federation_service_pb2.DESCRIPTOR.services_by_name["FederationService"].full_name,
    operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
)


class Server:
    """One daemon on one data folder.

    Args:
        settings: What it was told.
        timing: When clients are said to hang.
    """

    def __init__(self, settings: Settings, timing: Timing = TIMING) -> None:
        self.settings = settings
        self.timing = timing
        self.stopping = asyncio.Event()
        self.started = asyncio.Event()
        self.metrics = Metrics()
        self.background = Background(self.metrics, self.stopping.set)
        self._refreshing = asyncio.Lock()

    async def run(self) -> None:
        """Lives until it is told to stop: starts, serves, drains, closes.

        Raises:
            Internal: If background work could not go on, which ended it.
        """
        traces = traced(self.settings.traces, "fedpeft-server", self.settings.listen)
        with _locked(self.settings.data_dir), traces, self._signals():
            try:
                await self.startup()
            except BaseException:
                await self.background.close()
                raise
            try:
                await self.serve()
            finally:
                await self.shutdown()
            if self.background.fault:
                raise self.background.fault

    async def startup(self) -> None:
        """Builds the parts, takes up every run, and binds the ports."""
        settings = self.settings
        _allow_open_files()
        self.metrics.build.labels(__version__).set(1)
        self.metrics.watch_disk(settings.data_dir)
        asyncio.get_running_loop().set_exception_handler(self.background.unhandled)
        self.byte_counter = ByteCounter(self.metrics)
        self.store = Store(
            settings.data_dir, settings.database, settings.blobs, settings.updates, keep_updates=settings.keep_updates
        )
        self.sessions = Sessions(await self.store.transact(self.store.db.clients), settings.max_clients)
        progress = ProgressWatch(
            self.store, self.metrics, self.sessions.last_activity, lambda client: self.uploads.has(client), self.timing
        )
        self.runs = Runs(self.store, self.byte_counter, self.metrics, self.background, progress)
        durable.sweep(settings.certificates)
        self.certificates = ServerCertificates.of(settings.certificates)
        if self.certificates is None and not settings.insecure:
            await self.store.transact(refuse_lost_certificates, self.store.db, settings.certificates)
        self.admission = await self._admission()
        self.rpc, self.enrolling = self._grpc_servers()
        self._bind()
        if settings.metrics:
            where = Address.parse(settings.metrics, free=True)
            self.exporter = self.metrics.serve(where.host, where.port)
        await tell_lost_versions(self.store)
        await self.runs.start()
        for evaluator in self.sessions.evaluators():
            for run in self.runs.participation.accepted_by(evaluator):
                self.runs.scoring.takes_part(run, evaluator)
        await self.store.transact(self.store.db.transactions.write, AuditEvent("server", "server.started", __version__))
        self._begin_upkeep()

    def _begin_upkeep(self) -> None:
        background = self.background
        background.every("traffic", BOOK_S, self._book)
        background.supervise("traffic", self._book_payloads())
        background.every("database", PROBE_S, self._probe_database)
        background.every("certificate", LOOK_S, self._renew_certificate)
        background.every("certificate files", FILES_S, self._take_up_certificates)
        background.every("log", bounds.QUIET_S, self._tell_left_out)
        background.every("tokens", PURGE_S, self._purge_tokens)
        background.every("files", CLEAN_S, partial(self.store.fold, self.store.clean))
        background.every("storage", MEASURE_S, self._measure)
        background.supervise("health", self._show_health())
        if self.enrolment:
            background.every("enrolment", PAUSE_S, self.enrolment.run)

    async def serve(self) -> None:
        """Participation calls until somebody says stop."""
        await asyncio.gather(self.rpc.start(), self.enrolling.start())
        self.started.set()
        self.background.changed.set()
        log.info(
            "serving",
            version=__version__,
            listen=str(Address(Address.parse(self.settings.listen, free=True).host, self.port)),
            security="TLS 1.3" if self.certificates else "none",
            enroll=self.enrollment or "nowhere",
            metrics=self.settings.metrics,
            data=str(self.settings.data_dir),
            runs=len(self.runs.all()),
        )
        await self.stopping.wait()

    async def shutdown(self) -> None:
        """Opens no round, lets transfers under way finish for a stated time, and writes what is left to write."""
        log.info("draining", seconds=self.settings.drain_s)
        await self.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._send_away()
        await asyncio.gather(*(server.stop(self.settings.drain_s) for server in (self.rpc, self.enrolling)))
        await self.uploads.close()
        await self.access.tasks.wait()
        await self.background.close()
        await self.runs.close()
        if self.enrolment:
            await self.enrolment.close()
        try:
            await self._write_books()
        except FedpeftError as error:
            log.error("cannot write byte counts to the database", message=error.message)
        self.store.close()
        if self.settings.metrics:
            self.exporter.shutdown()
            self.exporter.server_close()
        log.info("stopped")

    def _send_away(self) -> None:
        """Ends what only waits, for a round, a turn or news: it would hold the end up though nobody is at work."""
        self.runs.lobby.close()
        self.admission.drain()
        self.uploads.drain()
        self.downloads.close()

    def _grpc_servers(self) -> tuple[grpc.aio.Server, grpc.aio.Server]:
        """Returns the server for --listen, and that for what the process at --enroll hands on: the same services."""
        limit = self.settings.max_transfers
        self.uploads = Uploads(
            self.store, self.byte_counter, self.settings.max_update_bytes, limit, self.runs.declared_examples
        )
        self.downloads = TransferSlots(limit)
        self.caller_log = CallerLog(self.metrics)
        federation = Federation(
            self.runs,
            self.store,
            self.sessions,
            self.uploads,
            self.downloads,
            self.byte_counter,
            self.metrics,
            self.caller_log,
        )
        operator = Operator(self.runs, self.store, self.sessions, self.uploads, self.byte_counter)
        life = timedelta(seconds=self.settings.certificate_life_s)
        self.access = Access(
            self.store,
            self.admission,
            self.runs,
            self.sessions,
            self.certificates,
            self._take_up_certificates,
            self._addresses,
            life,
        )
        self.health = Health()
        self.gate = Gate(self.admission, self.metrics, self.byte_counter, self.caller_log)
        listening = grpc.aio.server(interceptors=[self.gate], options=connections.options(bounds.MAIN))
        enrolling = grpc.aio.server(interceptors=[self.gate], options=connections.options(bounds.FORWARDED))
        for server in (listening, enrolling):
            federation_service_pb2_grpc.add_FederationServiceServicer_to_server(federation, server)
            operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(operator, server)
            access_service_pb2_grpc.add_AccessServiceServicer_to_server(self.access, server)
            health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
            reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        return listening, enrolling

    async def _admission(self) -> Admission:
        """Returns what decides over calls, with what the database knows."""
        known = await self.store.transact(self.store.db.identities.after, ("", ""))
        for row in known:
            if row.is_revoked:
                self.sessions.dismiss(row.subject)
        own = self.certificates
        return Admission(self.store, known, secured=own is not None, enrolls=bool(own and own.issuing))

    def _bind(self) -> None:
        """Takes the ports: one, and with an authority a second one where devices enroll."""
        settings, own = self.settings, self.certificates
        for fault in own.faults(datetime.now(UTC)) if own else ():
            log.error("clients cannot connect with these certificates", cause=fault)
        if own is None and not Address.parse(settings.listen, free=True).is_loopback:
            log.warning("serving other machines without encryption, because of --insecure", listen=settings.listen)
        self.port = self._take(self.rpc, settings.listen, "--listen", own.credentials(ask=True) if own else None)
        self.enrolment: Enrolment | None = None
        self.enrollment = ""
        if own and own.issuing:
            where = Address.parse(settings.enroll_address, free=True)
            try:
                listening = enrolment.bind(settings.enroll_address)
            except OSError:
                raise _cannot_bind("--enroll", settings.enroll_address) from None
            self.enrolment = Enrolment(listening, own, self.health, self.metrics)
            self.enrolling.add_insecure_port(f"unix:{self.enrolment.socket}")
            self.enrollment = str(Address(where.host, listening.getsockname()[1]))

    def _take(
        self, server: grpc.aio.Server, address: str, flag: str, credentials: grpc.ServerCredentials | None
    ) -> int:
        try:
            add = server.add_secure_port
            bound = add(address, credentials) if credentials else server.add_insecure_port(address)
        except RuntimeError:
            bound = 0
        if not bound:
            raise _cannot_bind(flag, address)
        return bound

    def _addresses(self) -> Addresses:
        """Returns where the server is reached, for enrolment tokens."""
        host = self.certificates.hosts[0] if self.certificates else Address.parse(self.settings.listen, free=True).host
        server = Address.parse(self.settings.advertise) if self.settings.advertise else Address(host, self.port)
        enroll = self.settings.advertise_enroll or (
            str(Address(server.host, Address.parse(self.enrollment).port)) if self.enrollment else ""
        )
        return Addresses(str(server), enroll)

    async def _renew_certificate(self) -> None:
        """Renews the server's certificate in time, or takes up what others wrote, and shows when it ends."""
        if (own := self.certificates) is None:
            return
        try:
            async with self._refreshing:
                replaced = await self.store.file(own.refresh)
            if replaced:
                if self.enrolment:
                    self.enrolment.renewed()
                log.info(
                    "server certificates replaced",
                    ends=str(own.certificate.not_valid_after_utc),
                    authorities=[certificates.fingerprint(one)[:16] for one in own.authorities.trusted],
                )
        finally:
            self.metrics.certificate_expires("server", own.certificate.not_valid_after_utc.timestamp())
            self.metrics.certificate_expires("authority", own.root.not_valid_after_utc.timestamp())

    async def _take_up_certificates(self) -> None:
        """Takes up what a command wrote since the files were read."""
        own = self.certificates
        if own is None:
            return
        if await self.store.file(own.changed):
            await self._renew_certificate()

    async def _probe_database(self) -> None:
        await self.store.transact(self.store.db.transactions.probe)

    async def _purge_tokens(self) -> None:
        await self.store.transact(self.store.db.identities.purge_tokens, time.time() - TOKENS_KEPT_S)

    async def _tell_left_out(self) -> None:
        self.caller_log.log_suppressed()

    async def _book(self) -> None:
        self.metrics.registered(self.sessions.silences(time.time()))
        await self._write_books()

    async def _write_books(self) -> None:
        await self.byte_counter.write(self.store)
        await self.sessions.write(self.store)

    async def _book_payloads(self) -> None:
        """Writes traffic soon after a payload moved: what is not written is lost if the process is killed."""
        while True:
            await self.byte_counter.moved.wait()
            await asyncio.sleep(MOVED_S)
            with self.background.attempt("traffic"):
                await self.byte_counter.write(self.store)

    async def _measure(self) -> None:
        """Shows how much is stored."""
        for place, size_bytes in (await self.store.fold(self.store.sizes)).items():
            self.metrics.stored_bytes.labels(place).set(size_bytes)

    async def _show_health(self) -> None:
        """Has health checks say whether the background work goes on."""
        while True:
            await self.background.changed.wait()
            self.background.changed.clear()
            well = self.background.healthy and not self.stopping.is_set()
            status = health_pb2.HealthCheckResponse
            await self.health.set("", status.SERVING if well else status.NOT_SERVING)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the main loop once; a second one ends the process."""
        loop, before = asyncio.get_running_loop(), asyncio.get_running_loop().get_exception_handler()

        def stop(number: int) -> None:
            loop.remove_signal_handler(number)
            self.stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            loop.set_exception_handler(before)


def _cannot_bind(flag: str, address: str) -> SettingsInvalid:
    return SettingsInvalid(f"{flag} {address}: the port is in use or the address is not this machine's")


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
def _locked(folder: Path) -> Iterator[None]:
    """Holds the data folder for this process.

    Raises:
        StateInvalid: If it cannot be made or written, or another server holds it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # updates are nobody else's to read
    except OSError as error:
        raise StateInvalid(f"--data-dir {folder}: {error.strerror}; name a folder this user can write") from None
    with locks.directory(folder, f"--data-dir {folder}", "server", "name another folder"):
        durable.sweep(folder)
        yield
