"""A real daemon in this process, on loopback sockets, raw clients that speak the protocol to it, and real databases."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import sqlite3
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import Engine, create_engine, text

from fedpeft.adapters import payload
from fedpeft.adapters.payload import CHUNK_BYTES, Manifest
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import FedpeftError
from fedpeft.rpc import wire
from fedpeft.rpc.end_status import EndStatus
from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import federation_service_pb2_grpc as fed_grpc
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import operator_service_pb2_grpc as op_grpc
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_server import app
from fedpeft_server.parts import Parts
from fedpeft_server.settings import Settings
from fedpeft_server.store.database import Database
from fedpeft_server.store.migrations import migrate
from fedpeft_server.timing import TIMING, Timing

from .object_store import ACCESS, s3_server
from .rows import run_row, version_row

Arrays = dict[str, NDArray[np.float32]]
T = TypeVar("T")

SPEC = AdapterSpec.of("bias", [TensorSpec("blocks.0.bias", (7,)), TensorSpec("head.weight", (3, 5))])


def zeros(spec: AdapterSpec = SPEC) -> Arrays:
    return {t.name: np.zeros(t.shape, np.float32) for t in spec.shared}


def filled(value: float, spec: AdapterSpec = SPEC) -> Arrays:
    return {t.name: np.full(t.shape, value, np.float32) for t in spec.sent(1)}


def config(**sections: dict[str, object]) -> RunConfig:
    base: dict[str, object] = {
        "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b", "c"]},
        "peft": {"method": "bias"},
        "rounds": {"count": 2, "clients": 2, "quorum": 2},
    }
    return parse_config({**base, **sections})


class RawClient:
    """One client's view of the protocol; nothing is retried and nothing is hidden."""

    def __init__(self, channel: grpc.aio.Channel, name: str, instance: str | None = None) -> None:
        self.name = name
        self.stub = fed_grpc.FederationServiceStub(channel)
        self.metadata = (
            (wire.CLIENT_KEY, name),
            (wire.INSTANCE_KEY, instance or name.encode().hex().ljust(32, "0")[:32]),
        )

    async def register(self, role: int = fed.CLIENT_ROLE_TRAINER, run: str = "") -> fed.RegisterResponse:
        request = fed.RegisterRequest(min_protocol=1, max_protocol=1, role=role, run=run)
        return await self.stub.Register(request, metadata=self.metadata)

    async def wait(self, run: str = "") -> fed.AwaitRoundResponse:
        """Asks for work; accepts every run that is offered first."""
        while True:
            answer = await self.look(run)
            if not answer.HasField("offer"):
                return answer
            offered = answer.offer.run
            said = offered.config
            await self.answer(offered.id, algorithm=said.training.algorithm.name, mechanism=said.privacy.mechanism)

    async def look(self, run: str = "", *, until_finished: bool = False) -> fed.AwaitRoundResponse:
        request = fed.AwaitRoundRequest(run=run, until_finished=until_finished)
        return await self.stub.AwaitRound(request, metadata=self.metadata)

    async def answer(self, run: str, *reasons: str, examples: int = 0, **said: str) -> None:
        """Accepts a run, or declines it if there are reasons."""
        verdict = fed.ANSWER_DECLINED if reasons else fed.ANSWER_ACCEPTED
        request = fed.AnswerOfferRequest(run=run, answer=verdict, reasons=reasons, examples=examples, **said)
        await self.stub.AnswerOffer(request, metadata=self.metadata)

    async def task(self, run: str = "") -> fed.TrainingTask:
        while True:
            answer = await self.wait(run)
            if answer.HasField("training"):
                return answer.training

    async def pull(self, run: str, version: int, have: bytes = b"", offset: int = 0) -> tuple[fed.PullHeader, bytes]:
        request = fed.PullAdapterRequest(run=run, version=version, have_sha256=have, offset=offset)
        call = self.stub.PullAdapter(request, metadata=self.metadata)
        header, data = None, bytearray()
        try:
            async for part in call:
                if part.HasField("header"):
                    header = part.header
                else:
                    assert part.chunk.offset == offset + len(data)
                    data += part.chunk.data
        finally:
            call.cancel()  # gRPC ends a call whose reader was cancelled between two messages when that is collected
        assert header is not None
        return header, bytes(data)

    async def push(
        self, ticket: str, arrays: Arrays, examples: int = 10, encoding: str = "float32", spec: AdapterSpec = SPEC
    ) -> fed.PushUpdateResponse:
        manifest, data = payload.encode(arrays, spec.sent(1), encoding)
        return await self.push_raw(header(ticket, manifest, examples), [(0, data)])

    async def push_raw(self, first: fed.UpdateHeader, chunks: list[tuple[int, bytes]]) -> fed.PushUpdateResponse:
        async def requests() -> AsyncIterator[fed.PushUpdateRequest]:
            yield fed.PushUpdateRequest(header=first)
            for offset, data in chunks:
                yield fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=offset, data=data))

        return await self.send(requests())

    async def send(self, requests: AsyncIterator[fed.PushUpdateRequest]) -> fed.PushUpdateResponse:
        """Makes one upload call; one that the server ends raises the server's status, whatever was being written."""
        return await answered(self.stub.PushUpdate(requests, metadata=self.metadata))

    async def upload(self, ticket: str, sha256: bytes = b"") -> fed.GetUploadResponse:
        return await self.stub.GetUpload(fed.GetUploadRequest(ticket=ticket, sha256=sha256), metadata=self.metadata)

    async def withdraw(self, ticket: str, reason: str = "") -> fed.WithdrawResponse:
        return await self.stub.Withdraw(fed.WithdrawRequest(ticket=ticket, reason=reason), metadata=self.metadata)


def header(ticket: str, manifest: Manifest, examples: int = 10, **metrics: float) -> fed.UpdateHeader:
    message = wire.manifest_to_proto(manifest)
    return fed.UpdateHeader(ticket=ticket, manifest=message, examples=examples, metrics=metrics)


async def answered(call: grpc.aio.StreamUnaryCall[Any, T]) -> T:
    """Returns the answer of a call with a streamed request, or raises the status that the server gave."""
    end = EndStatus(call)
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise await end.error() from error


class Daemon:
    """A running server with a channel to it."""

    def __init__(self, server: Parts, channel: grpc.aio.Channel, end: Callable[[], Awaitable[None]]) -> None:
        self.server = server
        self.end = end
        self.channel = channel
        self.operator = op_grpc.OperatorServiceStub(channel)

    def client(self, name: str, instance: str | None = None) -> RawClient:
        return RawClient(self.channel, name, instance)

    async def clients(self, *names: str) -> list[RawClient]:
        clients = [self.client(name) for name in names]
        for client in clients:
            await client.register()
        return clients

    async def create(
        self,
        run: RunConfig | None = None,
        spec: AdapterSpec = SPEC,
        arrays: Arrays | None = None,
        request_id: str = "r",
    ) -> run_pb2.Run:
        manifest, data = payload.encode(arrays or zeros(spec), spec.shared, "float32")
        first = op.CreateRunHeader(
            config=wire.config_to_proto(run or config()),
            spec=wire.spec_to_proto(spec),
            backbone_fingerprint="ab" * 32,
            manifest=wire.manifest_to_proto(manifest),
            request_id=request_id,
            model_parameters=1000,
        )
        chunks = [(start, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
        return (await self.create_raw(first, chunks)).run

    async def create_raw(self, first: op.CreateRunHeader, chunks: list[tuple[int, bytes]]) -> op.CreateRunResponse:
        async def requests() -> AsyncIterator[op.CreateRunRequest]:
            yield op.CreateRunRequest(header=first)
            for offset, chunk in chunks:
                yield op.CreateRunRequest(chunk=tensor_pb2.Chunk(offset=offset, data=chunk))

        return await answered(self.operator.CreateRun(requests()))

    async def rounds(self, run: str) -> list[run_pb2.Round]:
        return list((await self.operator.ListRounds(op.ListRoundsRequest(run=run))).rounds)

    async def run(self, run: str) -> run_pb2.Run:
        return (await self.operator.GetRun(op.GetRunRequest(run=run))).run

    async def until(self, run: str, reached: Callable[[run_pb2.Run], bool], seconds: float = 10) -> run_pb2.Run:
        """Waits for a state of a run, by watching it."""
        async with asyncio.timeout(seconds):
            async for news in self.operator.WatchRun(op.WatchRunRequest(run=run)):
                if reached(news.run):
                    return news.run
        raise AssertionError("the run ended otherwise")

    async def adapter(self, run: str, version: int) -> Arrays:
        """Pulls a version as an evaluator would and decodes it."""
        reader = self.client("reader")
        await reader.register(fed.CLIENT_ROLE_EVALUATOR)
        head, data = await reader.pull(run, version)
        return payload.decode(wire.manifest_from_proto(head.manifest), memoryview(data))


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of SQLite, with the schema as all migrations leave it."""
    path = tmp_path_factory.mktemp("migrated") / "fedpeft.db"
    Database.open(f"sqlite:///{path}", TIMING).close()
    return path


@pytest.fixture(autouse=True)
def migrations_once(migrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a new database of SQLite begin with that schema, which makes the start of a daemon a third cheaper."""

    def copied(engine: Engine) -> None:
        if engine.dialect.name == "sqlite":
            with closing(engine.raw_connection()) as ours, closing(sqlite3.connect(migrated)) as source:
                target = ours.driver_connection
                assert isinstance(target, sqlite3.Connection)
                with suppress(sqlite3.Error):  # the real one says what is wrong
                    if target.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                        source.backup(target)
        migrate(engine)

    monkeypatch.setattr("fedpeft_server.store.database.migrate", copied)


StartDaemon = Callable[..., Awaitable[Daemon]]


async def begin_life(settings: Settings, timing: Timing = TIMING) -> tuple[Parts, Callable[[], Awaitable[None]]]:
    """Starts a daemon; returns its parts once it serves, and what ends it."""
    begun: asyncio.Future[Parts] = asyncio.get_running_loop().create_future()

    async def live() -> None:
        async with app.serving(settings, timing) as parts:
            begun.set_result(parts)
            await parts.stopping.wait()

    living = asyncio.create_task(live())
    await asyncio.wait({living, begun}, return_when=asyncio.FIRST_COMPLETED)
    if not begun.done():
        await living
    parts, told = begun.result(), False

    async def end() -> None:
        """Ends it; raises the fault that it ends with, once."""
        nonlocal told
        parts.stopping.set()
        await asyncio.wait({living})
        if not told:
            told = True
            living.result()

    return parts, end


def timing_of(request: pytest.FixtureRequest) -> Timing:
    """Returns the durations of the daemons that a test starts: the server's own but those of its mark `timed`."""
    marks = list(request.node.iter_markers("timed"))
    return replace(TIMING, **{name: value for mark in reversed(marks) for name, value in mark.kwargs.items()})


@pytest.fixture
async def start(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[StartDaemon]:
    """Starts daemons; the same folder may be given again once the one before was stopped."""
    usual = timing_of(request)
    async with AsyncExitStack() as stack:

        async def begin(folder: Path | None = None, timing: Timing = usual, **settings: object) -> Daemon:
            from ..ports import free_port  # only here: tests/chaos has this file as a module of another package

            port = free_port()
            values = {
                "data_dir": folder or tmp_path / "data",
                "listen": f"127.0.0.1:{port}",
                "metrics": "",
                "drain_s": 1.0,
            }
            server, end = await begin_life(Settings.model_validate({**values, **settings}), timing)
            stack.push_async_callback(end)
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            stack.push_async_callback(channel.close)
            async with asyncio.timeout(10):
                await channel.channel_ready()
            return Daemon(server, channel, end)

        yield begin


@pytest.fixture
async def daemon(start: StartDaemon) -> Daemon:
    return await start()


async def fault(call: Awaitable[object]) -> FedpeftError:
    """Returns the error with which a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def refused(call: Awaitable[object]) -> str:
    """Returns the reason with which a call is refused."""
    return (await fault(call)).reason


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    """Starts a PostgreSQL of its own; gives the folder of its socket."""
    for program in ("initdb", "pg_ctl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} of PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    root = os.geteuid() == 0
    try:
        user = pwd.getpwnam("postgres") if root else pwd.getpwuid(os.geteuid())
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    folder = Path(tempfile.mkdtemp(prefix="fedpeft-postgres-"))
    os.chown(folder, user.pw_uid, user.pw_gid)

    def call(*command: str) -> None:
        subprocess.run(
            command, check=True, cwd=folder, stdout=subprocess.DEVNULL, timeout=60, user=user.pw_uid if root else None
        )

    try:
        call("initdb", "-D", "data", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        call("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")
        yield folder
        call("pg_ctl", "-D", "data", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Starts an S3 for all tests that want one."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket; processes that a test starts find it as well."""
    bucket = f"tests-{time.monotonic_ns()}"
    request = urllib.request.Request(f"{s3_endpoint}/{bucket}", method="PUT", headers={"Host": "s3.amazonaws.com"})
    with urllib.request.urlopen(request, timeout=10):
        pass
    for name, value in {**ACCESS, "AWS_ENDPOINT": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    return f"s3://{bucket}"


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'server.db'}"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def postgresql_url(postgres: Path) -> str:
    """A new database in PostgreSQL."""
    return _new_database(postgres, f"test_{time.monotonic_ns()}")


@pytest.fixture(scope="session")
def migrated_template(postgres: Path) -> str:
    """Name of a database in PostgreSQL with the schema as all migrations leave it."""
    Database.open(_new_database(postgres, "migrated"), TIMING).close()
    return "migrated"


@pytest.fixture
def migrated_postgresql_url(postgres: Path, migrated_template: str) -> str:
    """A new database in PostgreSQL with that schema, which saves the migrations."""
    return _new_database(postgres, f"test_{time.monotonic_ns()}", f"TEMPLATE {migrated_template}")


def _new_database(postgres: Path, name: str, template: str = "") -> str:
    admin = create_engine(f"postgresql+psycopg://postgres@/postgres?host={postgres}", isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} {template}"))
    admin.dispose()
    return f"postgresql://postgres@/{name}?host={postgres}"


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database.open(url, TIMING)
    yield database
    database.close()


@pytest.fixture
def with_run(database: Database) -> Database:
    database.create_run(run_row(), version_row(0))
    return database


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'server.db'}"


@pytest.fixture
async def secured(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[object]:
    """A `secured.Federation`: a daemon over TLS."""
    from .secured import federation  # which needs what is above

    async with federation(tmp_path, timing_of(request)) as running:
        yield running
