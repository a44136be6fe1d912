"""Uploads that follow no rule, over real gRPC: nothing breaks, nothing leaks, and who keeps the rules is served."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpeft.adapters import payload
from fedpeft.adapters.payload import CHUNK_BYTES
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2, tensor_pb2
from fedpeft_server.settings import Settings

from ...ports import free_port
from ..conftest import SPEC, Daemon, RawClient, begin_life, config, filled, header
from .test_uploads import open_files

MANIFEST, DATA = payload.encode(filled(1.0), SPEC.sent(1), "float32")
OTHER_MANIFEST, OTHER_DATA = payload.encode(filled(2.0), SPEC.sent(1), "float32")
_, NOT_FINITE = payload.encode(filled(float("nan")), SPEC.sent(1), "float32")
NAMES = ("bad-0", "bad-1", "bad-2")


@dataclass(frozen=True)
class Header:
    """A header: whose ticket it names, and what is wrong with it."""

    ticket: str = "own"
    kind: str = "good"

    def message(self, tickets: dict[str, str]) -> fed.PushUpdateRequest:
        manifest = {
            "other": OTHER_MANIFEST,
            "long": replace(MANIFEST, payload_bytes=MANIFEST.payload_bytes + 4),
            "empty": replace(MANIFEST, entries=(), payload_bytes=0),
            "digest": replace(MANIFEST, sha256=bytes(32)),
            "short digest": replace(MANIFEST, sha256=b"short"),
        }.get(self.kind, MANIFEST)
        examples = 0 if self.kind == "no examples" else 10
        figures = {"loss": float("nan")} if self.kind == "not finite" else {"loss": 1.0}
        first = header(tickets[self.ticket], manifest, examples, **figures)
        return fed.PushUpdateRequest(header=first)


@dataclass(frozen=True)
class Chunk:
    """A chunk: where it says it begins (None: where the one before it ended), how long it is, and of which bytes."""

    offset: int | None
    size: int
    data: bytes

    def message(self, end: int) -> fed.PushUpdateRequest:
        offset = end if self.offset is None else self.offset
        filling = bytes(max(0, self.size - len(self.data)))
        piece = self.data[offset : offset + self.size] or (self.data + filling)[: self.size]
        return fed.PushUpdateRequest(chunk=tensor_pb2.Chunk(offset=offset, data=piece))


@dataclass(frozen=True)
class Act:
    """Inputs that are not messages: `nothing` (an empty one), `pause`, `cancel`."""

    name: str


Step = Header | Chunk | Act
Script = list[list[Step]]
"""The calls of one client, one after the other."""

HEADERS = st.builds(
    Header,
    ticket=st.sampled_from(["own"] * 8 + ["none", "another's"]),
    kind=st.sampled_from(
        ["good"] * 8 + ["other", "long", "empty", "digest", "short digest", "no examples", "not finite"]
    ),
)
CHUNKS = st.builds(
    Chunk,
    offset=st.none() | st.none() | st.sampled_from([0, 4, len(DATA) - 4, len(DATA), 2**40]),
    size=st.sampled_from([0, 1, 7, 44, len(DATA), len(DATA) + 1, CHUNK_BYTES + 1]),
    data=st.sampled_from([DATA, DATA, DATA, OTHER_DATA, NOT_FINITE, b"\xff" * len(DATA)]),
)
STEPS = CHUNKS | CHUNKS | CHUNKS | HEADERS | st.builds(Act, st.sampled_from(["nothing", "pause", "cancel"]))
CALLS = st.tuples(HEADERS | HEADERS | HEADERS | STEPS, st.lists(STEPS, max_size=6)).map(lambda c: [c[0], *c[1]])
SCRIPTS = st.lists(st.lists(CALLS, max_size=3), min_size=len(NAMES), max_size=len(NAMES))


class World:
    """One daemon for all examples; each has a run of its own."""

    def __init__(self, runner: asyncio.Runner, daemon: Daemon) -> None:
        self._runner, self._daemon = runner, daemon
        self._numbers = itertools.count()
        self._spool = daemon.server.settings.data_dir / "spool"

    def play(self, scripts: list[Script], together: bool) -> run_pb2.Run:
        """Lets the others upload by their scripts, and the good one as it should; returns the run as it ended."""
        return self._runner.run(self._play(scripts, together))

    async def _play(self, scripts: list[Script], together: bool) -> run_pb2.Run:
        daemon = self._daemon
        rounds = {"count": 1, "clients": 1 + len(NAMES), "quorum": 1}
        run = await daemon.create(config(rounds=rounds), request_id=f"r{next(self._numbers)}")
        good, *bad = await daemon.clients("good", *NAMES)
        tickets = [t.ticket for t in await asyncio.gather(*(c.task(run.id) for c in (good, *bad)))]
        for client, ticket, script in zip(bad, tickets[1:], scripts, strict=True):
            names = {"own": ticket, "none": "ticket-none", "another's": tickets[0]}
            calls = [self._call(client, steps, names) for steps in script]
            if together:
                await asyncio.gather(*calls)
            else:
                for call in calls:
                    await call
        for client, ticket in zip(bad, tickets[1:], strict=True):
            await client.upload(ticket)  # calls begin in order: once this is answered, none of before is still to begin
        await self._nothing_is_left()
        for client, ticket in zip(bad, tickets[1:], strict=True):
            await self._behave(client, ticket)
        assert (await good.push(tickets[0], filled(1.0))).sha256 == MANIFEST.sha256
        done = await daemon.until(run.id, lambda r: r.version == 1)
        await self._nothing_is_left(files=True)
        return done

    async def _call(self, client: RawClient, steps: list[Step], tickets: dict[str, str]) -> None:
        call: grpc.aio.StreamUnaryCall[fed.PushUpdateRequest, fed.PushUpdateResponse]

        async def requests() -> AsyncIterator[fed.PushUpdateRequest]:
            end = 0
            for step in steps:
                if isinstance(step, Header):
                    yield step.message(tickets)
                elif isinstance(step, Chunk):
                    message = step.message(end)
                    end = message.chunk.offset + len(message.chunk.data)
                    yield message
                elif step.name == "nothing":
                    yield fed.PushUpdateRequest()
                elif step.name == "pause":
                    await asyncio.sleep(0.005)
                else:
                    call.cancel()

        call = client.stub.PushUpdate(requests(), metadata=client.metadata)
        async with asyncio.timeout(10):
            await call.code()  # the server's own count of codes is what is looked at

    async def _behave(self, client: RawClient, ticket: str) -> None:
        """Ends an upload by the rules, unless its ticket has come to its end."""
        held = await client.upload(ticket, MANIFEST.sha256)
        if held.state == run_pb2.TICKET_STATE_ISSUED:
            at = held.committed_bytes
            rest = [(at, DATA[at:])] if at < len(DATA) else []
            try:
                receipt = await client.push_raw(header(ticket, MANIFEST), rest)
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.DATA_LOSS, error  # earlier bytes of it were wrong
                receipt = await client.push_raw(header(ticket, MANIFEST), [(0, DATA)])
            assert receipt.sha256 == MANIFEST.sha256
        else:
            assert held.state in (run_pb2.TICKET_STATE_RECEIVED, run_pb2.TICKET_STATE_REFUSED)

    async def _nothing_is_left(self, files: bool = False) -> None:
        server = self._daemon.server
        left = self._leftovers(files)
        until = time.monotonic() + 10
        while any(left.values()) and time.monotonic() < until:
            await asyncio.sleep(0.005)
            left = self._leftovers(files)
        assert not any(left.values()), left
        requests = next(iter(server.metrics.requests.collect())).samples
        codes = {s.labels["code"] for s in requests if s.name.endswith("_total") and s.value}
        assert not codes & {"INTERNAL", "UNKNOWN"}

    def _leftovers(self, files: bool) -> dict[str, list[str]]:
        uploads, spool = self._daemon.server.uploads, self._daemon.server.store.spool
        session = self._daemon.server.sessions._sessions
        return {
            "calls": [name for name in NAMES if session[name].calls],
            "open files": open_files(self._spool),
            "writers": list(spool._writers),
            "slots": list(uploads._slots._held),
            "checks": list(uploads._concluding),
            "tasks": [step.get_name() for engine in self._daemon.server.runs.all() for step in engine.tasks._tasks],
            "files": [path.name for path in self._spool.iterdir()] if files else [],
        }


@asynccontextmanager
async def living(folder: Path) -> AsyncIterator[Daemon]:
    port = free_port()
    values = {"data_dir": folder, "listen": f"127.0.0.1:{port}", "metrics": "", "drain_s": 0.0, "max_transfers": 2}
    server, end = await begin_life(Settings.model_validate(values))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        async with asyncio.timeout(10):
            await channel.channel_ready()
        yield Daemon(server, channel, end)
    await end()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with asyncio.Runner() as runner:
        daemon = living(tmp_path_factory.mktemp("fuzz") / "data")
        yield World(runner, runner.run(daemon.__aenter__()))
        runner.run(daemon.__aexit__(None, None, None))


anything = given(scripts=SCRIPTS, together=st.booleans())
quietly = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@anything
@settings(max_examples=20, suppress_health_check=quietly)
def test_whatever_is_uploaded_the_server_stands(world: World, scripts: list[Script], together: bool) -> None:
    assert world.play(scripts, together).state == run_pb2.RUN_STATE_COMPLETED


@pytest.mark.slow
@pytest.mark.timeout(1800)
@anything
@settings(max_examples=1000, suppress_health_check=quietly)  # 14 minutes on two cores that did other work as well
def test_whatever_is_uploaded_the_server_stands_for_long(world: World, scripts: list[Script], together: bool) -> None:
    assert world.play(scripts, together).state == run_pb2.RUN_STATE_COMPLETED
