"""The parts of a daemon: made in order, each whole at its construction, and closed in the opposite order."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import cast

import grpc
import structlog
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fedpeft import __version__
from fedpeft.errors import FedpeftError, SettingsInvalid
from fedpeft.process import durable
from fedpeft.process.addresses import Address
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
from fedpeft_server.daemons.follower import Follower
from fedpeft_server.daemons.presence import Presence
from fedpeft_server.enrolment import supervisor
from fedpeft_server.enrolment.supervisor import Enrolment
from fedpeft_server.metrics import Metrics
from fedpeft_server.refresh import CertificateRefresh
from fedpeft_server.rpc import connections
from fedpeft_server.rpc.access import Access, Addresses
from fedpeft_server.rpc.caller_log import CallerLog
from fedpeft_server.rpc.federation import Federation
from fedpeft_server.rpc.health import Health
from fedpeft_server.rpc.interceptors import AdmissionInterceptor
from fedpeft_server.rpc.operator import Operator
from fedpeft_server.rpc.sessions import Sessions
from fedpeft_server.runs.participation import Participation
from fedpeft_server.runs.progress_watch import ProgressWatch
from fedpeft_server.runs.runs import Runs
from fedpeft_server.settings import Settings
from fedpeft_server.startup_checks import refuse_lost_certificates, refuse_unwritable_stores
from fedpeft_server.store.retention import RetentionPolicy
from fedpeft_server.store.store import Store
from fedpeft_server.timing import Timing
from fedpeft_server.traffic import ByteCounter
from fedpeft_server.uploads.pipeline import Uploads
from fedpeft_server.uploads.transfer_slots import TransferSlots

log = structlog.get_logger()

SERVICES = (
    access_service_pb2.DESCRIPTOR.services_by_name["AccessService"].full_name,
    federation_service_pb2.DESCRIPTOR.services_by_name["FederationService"].full_name,
    operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The bound ports, and the servers on them.

    Attributes:
        listening: Serves --listen.
        port: Its port.
        enrolling: Serves what the process for enrolment hands on: the same services.
        enrolment: That process; None where nobody enrolls.
        enroll_address: HOST:PORT where it listens; empty where nobody enrolls.
    """

    listening: grpc.aio.Server
    port: int
    enrolling: grpc.aio.Server
    enrolment: Enrolment | None
    enroll_address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """All parts of a daemon.

    Attributes:
        settings: Settings of the daemon.
        timing: Its durations.
        stopping: Set when it is to end.
        metrics: Its Prometheus metrics.
        background: Its background work.
        byte_counter: Bytes that are not in the database yet.
        store: Database, blobs and spool.
        sessions: Sessions of the clients.
        certificates: The server's own; None where it serves plain text.
        refresh: Keeps them those of their files.
        admission: Decides over calls.
        caller_log: Log lines about calls.
        interceptor: Stands in front of every handler.
        health: Answers health checks.
        ports: The bound ports.
        runs: The runs.
        uploads: Updates that arrive.
        downloads: Adapter versions that are sent.
        access: The service for enrolment and revocation.
        presence: The other daemons on the database, and who waits with which.
        follower: Takes up what those change.
    """

    settings: Settings
    timing: Timing
    stopping: asyncio.Event
    metrics: Metrics
    background: Background
    byte_counter: ByteCounter
    store: Store
    sessions: Sessions
    certificates: ServerCertificates | None
    refresh: CertificateRefresh
    admission: Admission
    caller_log: CallerLog
    interceptor: AdmissionInterceptor
    health: Health
    ports: Ports
    runs: Runs
    uploads: Uploads
    downloads: TransferSlots
    access: Access
    presence: Presence
    follower: Follower


async def build(settings: Settings, timing: Timing, stopping: asyncio.Event, stack: AsyncExitStack) -> Parts:
    """Makes the parts with what the database knows, and binds the ports; nothing is served and no run is taken up.

    Args:
        settings: Settings of the daemon, whose data folder is locked.
        timing: Its durations.
        stopping: Set by background work that cannot go on.
        stack: Takes how each part is closed, as it is made.

    Raises:
        FedpeftError: If one cannot be made; what was made before is on the stack.
    """
    metrics, health = _metrics(settings), Health()
    background = Background(metrics, stopping.set)
    stack.enter_context(background.taking_unhandled())
    byte_counter, caller_log = ByteCounter(metrics, timing), CallerLog(metrics, timing)
    store = await _store(settings, timing, metrics, stack)
    own = await _certificates(settings, store)
    sessions = Sessions(await store.transact(store.db.clients), settings.max_clients, timing, store.clock.time)
    stack.push_async_callback(_write_last_activity, byte_counter, sessions, store)
    admission = await _admission(store, own, sessions, timing)
    interceptor = AdmissionInterceptor(admission, metrics, byte_counter, caller_log)
    limit = settings.max_transfers
    participation = Participation(await store.transact(store.db.answers))
    uploads = Uploads(store, byte_counter, settings.max_update_bytes, limit, participation.examples, timing)
    downloads = TransferSlots(limit, timing)
    progress = ProgressWatch(store, metrics, sessions.last_activity, uploads.has, timing)
    known = await store.transact(store.db.standings)
    runs = Runs(store, byte_counter, metrics, background, progress, participation, known, timing, _retention(settings))
    ports = _bind(settings, own, interceptor, health, metrics, timing, stack)  # after all that may fail
    refresh = CertificateRefresh(own, store, metrics, ports.enrolment.renewed if ports.enrolment else _nothing)
    stack.push_async_callback(runs.close)
    stack.push_async_callback(background.close)  # before the runs, for it may begin a round
    stack.push_async_callback(uploads.close)

    addresses, life = partial(_addresses, settings, own, ports), timedelta(seconds=settings.certificate_life_s)
    access = Access(store, admission, runs, sessions, own, refresh.take_up, addresses, life, timing)
    stack.push_async_callback(access.tasks.wait)
    presence = Presence(store, runs.lobby, progress, uploads.clients, _kept(settings), background, timing)
    follower = Follower(store, runs, sessions, admission, access.dismiss, presence, background, timing)
    federation = Federation(runs, store, sessions, uploads, downloads, byte_counter, metrics, caller_log)
    operator = Operator(runs, store, sessions, uploads, byte_counter, timing)
    _add_services(ports, federation, operator, access, health)
    return Parts(
        settings=settings,
        timing=timing,
        stopping=stopping,
        metrics=metrics,
        background=background,
        byte_counter=byte_counter,
        store=store,
        sessions=sessions,
        certificates=own,
        refresh=refresh,
        admission=admission,
        caller_log=caller_log,
        interceptor=interceptor,
        health=health,
        ports=ports,
        runs=runs,
        uploads=uploads,
        downloads=downloads,
        access=access,
        presence=presence,
        follower=follower,
    )


def _retention(settings: Settings) -> RetentionPolicy | None:
    if settings.keep_versions is None:
        return None
    return RetentionPolicy(settings.keep_versions, settings.keep_versions_every)


def _kept(settings: Settings) -> str:
    """Returns the flags that say which files are kept, for the other daemons on the database."""
    named = {
        "--keep-updates": settings.keep_updates,
        f"--keep-versions {settings.keep_versions}": settings.keep_versions is not None,
        f"--keep-versions-every {settings.keep_versions_every}": settings.keep_versions_every,
    }
    return " ".join(flag for flag, given in named.items() if given) or "no --keep-updates or --keep-versions"


async def write_activity(byte_counter: ByteCounter, sessions: Sessions, store: Store) -> None:
    """Writes traffic and presence that are not in the database yet.

    Raises:
        FedpeftError: If they cannot be written.
    """
    await byte_counter.write(store)
    await sessions.write(store)


async def _write_last_activity(byte_counter: ByteCounter, sessions: Sessions, store: Store) -> None:
    try:
        await write_activity(byte_counter, sessions, store)
    except FedpeftError as error:
        log.error("cannot write byte counts to the database", message=error.message)


def _nothing() -> None:
    """Stands for a process for enrolment where there is none."""


def _metrics(settings: Settings) -> Metrics:
    metrics = Metrics()
    metrics.build.labels(__version__).set(1)
    return metrics


async def _store(settings: Settings, timing: Timing, metrics: Metrics, stack: AsyncExitStack) -> Store:
    """Opens the store, which is closed with the stack."""
    # A thread of its own: a database that gives no answer holds up neither the signals nor, in the end, the process.
    opening = ThreadPoolExecutor(1, "opening")
    opened = partial(
        Store,
        settings.data_dir,
        settings.database,
        settings.blobs,
        settings.updates,
        timing=timing,
        keep_updates=settings.keep_updates,
        min_free_bytes=settings.min_free_bytes,
        tell=metrics.corrupt,
    )
    opens = asyncio.get_running_loop().run_in_executor(opening, opened)
    opening.shutdown(wait=False)
    store = await opens
    stack.callback(store.close)
    for place, folder in store.room.folders.items():
        metrics.watch_disk(place, folder)
    await refuse_unwritable_stores(store, timing.store_answer_s)
    return store


async def _admission(store: Store, own: ServerCertificates | None, sessions: Sessions, timing: Timing) -> Admission:
    """Returns what decides over calls, with what the database knows."""
    known = await store.transact(store.db.identities.after, ("", ""))
    for row in known:
        if row.is_revoked:
            sessions.dismiss(row.subject)
    return Admission(store, known, timing, secured=own is not None, enrolls=bool(own and own.issuing))


async def _certificates(settings: Settings, store: Store) -> ServerCertificates | None:
    durable.sweep(settings.certificates)
    own = ServerCertificates.of(settings.certificates)
    if own is None and not settings.insecure:
        await store.transact(refuse_lost_certificates, store.db, settings.certificates)
    for fault in own.faults(datetime.now(UTC)) if own else ():
        log.error("clients cannot connect with these certificates", cause=fault)
    if own is None and not Address.parse(settings.listen, free=True).is_loopback:
        log.warning("serving other machines without encryption, because of --insecure", listen=settings.listen)
    return own


def _bind(
    settings: Settings,
    own: ServerCertificates | None,
    interceptor: AdmissionInterceptor,
    health: Health,
    metrics: Metrics,
    timing: Timing,
    stack: AsyncExitStack,
) -> Ports:
    """Takes the ports: one for calls, with an authority a second one where devices enroll, and that of the metrics.

    Those of gRPC come last: it frees a port only of a server that was started.
    """
    listening = grpc.aio.server(interceptors=[interceptor], options=connections.options(bounds.MAIN))
    enrolling = grpc.aio.server(interceptors=[interceptor], options=connections.options(bounds.FORWARDED))
    if settings.metrics:
        where = Address.parse(settings.metrics, free=True)
        exporter = metrics.serve(where.host, where.port)
        stack.callback(exporter.server_close)
        stack.callback(exporter.shutdown)
    enrolment, enroll_address = None, ""
    if own and own.issuing:
        bound = _enrolment_socket(settings.enroll_address)
        host = Address.parse(settings.enroll_address, free=True).host
        enroll_address = str(Address(host, bound.getsockname()[1]))
        enrolment = Enrolment(bound, own, health, metrics, timing)
        stack.push_async_callback(enrolment.close)
    port = _bind_port(listening, settings.listen, own.credentials(ask=True) if own else None)
    if enrolment:
        enrolling.add_insecure_port(f"unix:{enrolment.socket}")
    return Ports(
        listening=listening, port=port, enrolling=enrolling, enrolment=enrolment, enroll_address=enroll_address
    )


def _bind_port(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    try:
        bound = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        bound = 0
    if not bound:
        raise _cannot_bind("--listen", address)
    return bound


def _enrolment_socket(address: str) -> socket.socket:
    try:
        return supervisor.bind(address)
    except OSError:
        raise _cannot_bind("--enroll", address) from None


def _cannot_bind(flag: str, address: str) -> SettingsInvalid:
    return SettingsInvalid(f"{flag} {address}: the port is in use or the address is not this machine's")


def _addresses(settings: Settings, own: ServerCertificates | None, ports: Ports) -> Addresses:
    """Returns where the server is reached, for enrolment tokens."""
    host = own.hosts[0] if own else Address.parse(settings.listen, free=True).host
    server = Address.parse(settings.advertise) if settings.advertise else Address(host, ports.port)
    enroll = settings.advertise_enroll or (
        str(Address(server.host, Address.parse(ports.enroll_address).port)) if ports.enroll_address else ""
    )
    return Addresses(str(server), enroll)


def _add_services(ports: Ports, federation: Federation, operator: Operator, access: Access, health: Health) -> None:
    """Gives both servers the same services."""
    for server in (ports.listening, ports.enrolling):
        by_name = cast(grpc.aio.Server, _ByName(server))
        federation_service_pb2_grpc.add_FederationServiceServicer_to_server(federation, by_name)
        operator_service_pb2_grpc.add_OperatorServiceServicer_to_server(operator, by_name)
        access_service_pb2_grpc.add_AccessServiceServicer_to_server(access, by_name)
        health_pb2_grpc.add_HealthServicer_to_server(health, by_name)
        reflection.enable_server_reflection((*SERVICES, grpc_health.SERVICE_NAME, reflection.SERVICE_NAME), server)


class _ByName:
    """A server to which services are added by name alone, and not their methods once more, one by one.

    gRPC's server waits for the next call of each method that was registered by itself: it looks through them all with
    every call.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, _service: str, _handlers: object) -> None:
        """Leaves the methods to their service's handler."""
