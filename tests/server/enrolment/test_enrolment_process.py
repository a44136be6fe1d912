"""The port for enrolment: a process of its own, whose bounds are tried with real sockets, and its end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from fedpeft.identity import certificates, keys
from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import ENROLMENT, PortBound, Rate
from fedpeft_server.enrolment import supervisor
from fedpeft_server.enrolment.connection_proxy import Connection, ConnectionProxy
from fedpeft_server.enrolment.supervisor import Enrolment
from fedpeft_server.timing import TIMING

from ..secured import Federation

WAIT_S = 20


class Echo:
    """Stands where gRPC is: says back what it hears."""

    def __init__(self, proxy: ConnectionProxy, address: str) -> None:
        self.proxy = proxy
        self.address = address
        self.writers: list[asyncio.StreamWriter] = []

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        self.writers.append(writer)
        return reader, writer


@asynccontextmanager
async def echoing(folder: Path, **changes: object) -> AsyncIterator[Echo]:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        echoes.append(asyncio.current_task())
        with closing(writer), suppress(ConnectionError):
            while data := await reader.read(4096):
                writer.write(data)
        with suppress(ConnectionError):
            await writer.wait_closed()

    echoes: list[asyncio.Task[None] | None] = []
    path = str(folder / "echo")
    server = await asyncio.start_unix_server(echo, path)
    proxy = ConnectionProxy(path, TIMING, replace(ENROLMENT, **changes))  # type: ignore[arg-type]
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    serving = asyncio.create_task(proxy.serve(listening))
    found = Echo(proxy, f"127.0.0.1:{listening.getsockname()[1]}")
    try:
        yield found
    finally:
        for writer in found.writers:
            writer.close()
        serving.cancel()
        while proxy.count or not all(task and task.done() for task in echoes):
            await asyncio.sleep(0.01)
        listening.close()
        server.close()


async def is_served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Says whether a connection is passed on both ways."""
    try:
        writer.write(b"x")
        async with asyncio.timeout(WAIT_S):
            return await reader.read(1) == b"x"
    except ConnectionError:
        return False


async def until_closed(reader: asyncio.StreamReader) -> int:
    """Returns how many bytes come before the other side ends the connection."""
    count = 0
    try:
        async with asyncio.timeout(WAIT_S):
            while data := await reader.read(65_536):
                count += len(data)
    except ConnectionError:
        pass  # a reset is an end too
    return count


async def test_a_connection_that_grpc_does_not_take_is_counted(tmp_path: Path) -> None:
    async with echoing(tmp_path) as echo:
        (tmp_path / "echo").unlink()
        reader, _ = await echo.open()
        assert await until_closed(reader) == 0
        assert echo.proxy.refused == {"not served": 1}


async def test_one_address_has_so_many_connections_and_the_oldest_gives_way(tmp_path: Path) -> None:
    most = ENROLMENT.per_address or 0
    async with echoing(tmp_path) as echo:
        lines = [await echo.open() for _ in range(most)]
        assert all([await is_served(*line) for line in lines])
        newest = await echo.open()
        assert await is_served(*newest)
        assert await until_closed(lines[0][0]) == 0 and await is_served(*lines[1])
        assert echo.proxy.refused == {"too many of one address": 1} and echo.proxy.count == most


async def test_all_addresses_have_so_many_connections_and_the_greediest_gives_way(tmp_path: Path) -> None:
    proxy = ConnectionProxy(str(tmp_path / "nobody"), TIMING, replace(ENROLMENT, connections=6, per_address=4))
    ends: list[socket.socket] = []

    def take(address: str) -> Connection:
        ours, theirs = socket.socketpair()
        ends.append(ours)
        connection = Connection(address, f"ipv4:{address}:1")
        proxy.take(theirs, connection)
        return connection

    greedy = [take("10.0.0.1") for _ in range(4)]
    modest = [take("10.0.0.2"), take("10.0.0.3")]
    await_more = take("10.0.0.4")
    assert proxy.refused == {"too many connections": 1}
    assert proxy.count == 6
    left = {connection for of in proxy._open.values() for connection in of}
    assert left == {*greedy[1:], *modest, await_more}
    await asyncio.gather(*(c.task for c in (*greedy, *modest, await_more) if c.task), return_exceptions=True)
    assert proxy.count == 0
    for end in ends:
        end.close()


async def test_an_address_opens_so_many_connections_in_a_time(tmp_path: Path) -> None:
    async with echoing(tmp_path, opened=Rate(0.01, 5), per_address=100) as echo:
        lines = [await echo.open() for _ in range(7)]
        assert [await is_served(*line) for line in lines] == [True] * 5 + [False] * 2
        assert echo.proxy.refused == {"opened too fast": 2}


async def test_a_connection_that_says_nothing_is_closed(tmp_path: Path) -> None:
    async with echoing(tmp_path, silence_s=0.2) as echo:
        reader, _ = await echo.open()
        assert await until_closed(reader) == 0
        assert echo.proxy.refused == {"no data": 1}


async def test_a_connection_has_an_end_however_much_it_says(tmp_path: Path) -> None:
    async with echoing(tmp_path, life_s=0.3) as echo:
        reader, writer = await echo.open()
        assert await is_served(reader, writer)
        await until_closed(reader)
        assert echo.proxy.refused == {"open too long": 1}


async def test_a_connection_says_so_many_bytes(tmp_path: Path) -> None:
    most = ENROLMENT.received_bytes or 0
    async with echoing(tmp_path) as echo:
        for size, why in ((most - 1, {}), (most + 1, {"too much data": 1})):
            reader, writer = await echo.open()
            writer.write(bytes(size))
            if why:
                assert await until_closed(reader) <= most
            else:
                async with asyncio.timeout(WAIT_S):
                    await reader.readexactly(size)
            assert echo.proxy.refused == why


# The process


def process_of(federation: Federation) -> asyncio.subprocess.Process | None:
    enrolment: Enrolment | None = federation.server.ports.enrolment
    assert enrolment is not None
    return enrolment.process


async def status_of(federation: Federation) -> str:
    stub = health_pb2_grpc.HealthStub(federation.operators())
    known = (await stub.List(health_pb2.HealthListRequest())).statuses
    return health_pb2.HealthCheckResponse.ServingStatus.Name(known[supervisor.SERVICE].status)


async def test_it_begins_with_the_first_device_and_has_limits(secured: Federation) -> None:
    assert process_of(secured) is None
    await secured.enroll(await secured.token("a"))
    process = process_of(secured)
    assert process is not None
    most, _ = resource.prlimit(process.pid, resource.RLIMIT_DATA)
    assert 0 < most - private(process.pid) <= bounds.ENROLMENT_MEMORY
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] == 1024
    assert os.getpriority(os.PRIO_PROCESS, process.pid) > 0


def test_a_lower_limit_of_open_files_stays() -> None:
    """Only root may raise it: the process would end at its first device."""
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64));"
        "from fedpeft_server.enrolment.__main__ import _limit_files; _limit_files();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "(64, 64)\n"


async def test_it_is_started_again_and_that_is_said(secured: Federation) -> None:
    await secured.enroll(await secured.token("a"))
    for name in ("b", "c"):
        process = process_of(secured)
        assert process is not None and await status_of(secured) == "SERVING"
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            while await status_of(secured) != "NOT_SERVING":
                await asyncio.sleep(0.02)
        token, key = await secured.token(name), keys.make()
        await secured.enroll(token, key)  # it waits in line meanwhile
        assert await status_of(secured) == "SERVING"
    assert secured.server.metrics.enrolment_ends._value.get() == 2


async def test_it_is_well_again_after_the_pause_though_nobody_comes(secured: Federation) -> None:
    await secured.enroll(await secured.token("a"))
    process = process_of(secured)
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    async with asyncio.timeout(WAIT_S):
        for status in ("NOT_SERVING", "SERVING"):
            while await status_of(secured) != status:
                await asyncio.sleep(0.02)
    assert process_of(secured) is None


async def test_it_ends_when_nobody_comes_and_with_the_daemon(secured: Federation) -> None:
    await secured.enroll(await secured.token("a"))
    process, enrolment = process_of(secured), secured.server.ports.enrolment
    assert process is not None and enrolment is not None
    await enrolment.close()
    assert process.returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "7",
        "null",
        "[]",
        '"ready"',
        '{"refused": 1}',
        '{"refused": {"no data": "many"}}',
        '{"refused": {"no data": -1}}',
        '{"refused": {"of its own": 1}}',
        '{"odd": 1}',
        "x" * (3 * supervisor.LINE_BYTES),
    ],
    ids=lambda line: line[:20],
)
async def test_a_line_that_is_no_report_is_ignored_and_logged(
    secured: Federation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str
) -> None:
    talks = tmp_path / "python"
    report = '{"refused": {"no data": 2}}'
    talks.write_text(f"#!{sys.executable}\nprint({line!r})\nprint({report!r})\n")
    talks.chmod(0o700)
    enrolment = secured.server.ports.enrolment
    assert enrolment is not None
    monkeypatch.setattr(supervisor.sys, "executable", str(talks))  # type: ignore[attr-defined]
    with capture_logs() as logs:
        assert await enrolment._one_life() == 0
    assert any("is ignored" in entry["event"] for entry in logs), logs
    refused = secured.server.metrics.enrolment_refused
    assert [s.value for s in refused.collect()[0].samples if s.name.endswith("_total") and s.value] == [2.0]


def test_the_folder_of_a_killed_daemon_is_removed_by_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    script = (
        "import os, signal, socket\n"
        "from fedpeft_server.enrolment.supervisor import Enrolment\n"
        "kept = Enrolment(socket.socket(), None, None, None, None)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    others = [Enrolment(socket.socket(), None, None, None, TIMING) for _ in range(2)]  # type: ignore[arg-type]
    assert not left.exists()
    places = {Path(each.socket).parent for each in others}
    assert set(tmp_path.iterdir()) == places and {place.stat().st_mode & 0o777 for place in places} == {0o700}
    for each in others:
        asyncio.run(each.close())
    assert not any(tmp_path.iterdir())


async def test_a_header_without_end_takes_no_memory_and_others_enroll(secured: Federation) -> None:
    await secured.enroll(await secured.token("before"))
    process = process_of(secured)
    assert process is not None
    before = resident(process.pid)
    flood = asyncio.gather(*(asyncio.to_thread(headers_without_end, secured) for _ in range(8)))
    sent = await flood
    assert process_of(secured) is process and resident(process.pid) - before < 16 * 2**20
    assert max(sent) < 16 * 2**20, "the connection was ended"
    await secured.enroll(await secured.token("after"))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def private(pid: int) -> int:
    """Returns the private memory of a process that its limit counts, bytes."""
    (line,) = [ln for ln in Path(f"/proc/{pid}/status").read_text().splitlines() if ln.startswith("VmData:")]
    return int(line.split()[1]) * 1024


def headers_without_end(federation: Federation) -> int:
    """Sends HTTP/2 headers until the connection is ended, of 64 MiB at most; returns the bytes."""
    trusted = certificates.to_pem(federation.authority.certificate).decode()
    context = ssl.create_default_context(cadata=trusted)
    context.set_alpn_protocols(["h2"])
    host, _, port = federation.enrollment.rpartition(":")
    begin = b"\x00\x01x\x7f\x81\xff\xff\x7f"  # a literal header whose value has 2^28 bytes
    piece = struct.pack(">I", 16_384)[1:] + b"\x09\x00" + struct.pack(">I", 1) + b"a" * 16_384
    sent = 0
    try:
        with (
            socket.create_connection((host, int(port)), WAIT_S) as raw,
            context.wrap_socket(raw, server_hostname=host) as line,
        ):
            line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            line.sendall(struct.pack(">I", len(begin))[1:] + b"\x01\x00" + struct.pack(">I", 1) + begin)
            while sent < 64 * 2**20:
                line.sendall(piece)
                sent += len(piece)
    except OSError:
        pass  # it was cut off, which the caller sees by the bytes
    return sent


async def test_strangers_are_counted_by_their_own_address(secured: Federation) -> None:
    with pytest.raises(grpc.aio.AioRpcError):
        await secured.nobody().unary_unary("/fedpeft.v1.OperatorService/ListRuns")(b"x" * 15_000)
    (entry,) = [entry for entry in await secured.audit() if entry.action == "call.refused"]
    assert '"peer":"ipv4:127.0.0.1:' in entry.details


def test_the_port_bounds_are_whole() -> None:
    for port in (bounds.MAIN, ENROLMENT):
        assert isinstance(port, PortBound) and port.silence_s
