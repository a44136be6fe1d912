"""HTTP proxies: which is on the way, calls through one, and what is said of one that lets nothing through."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from fedpeft.errors import SettingsInvalid
from fedpeft.process.addresses import Address
from fedpeft.rpc.channel import open_channel
from fedpeft.rpc.diagnosis import diagnose
from fedpeft.rpc.proxies import Proxy, proxy_of

FAR = Address("fed.example.org", 7070)
VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def test_the_usual_variables_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_of(FAR, secured=True) is None
    monkeypatch.setenv("ALL_PROXY", "http://all:1")
    assert proxy_of(FAR, secured=True) == proxy_of(FAR, secured=False) == Proxy(Address("all", 1))
    monkeypatch.setenv("https_proxy", "http://ada:s%40cret@proxy.hospital:8080/")
    assert proxy_of(FAR, secured=True) == Proxy(Address("proxy.hospital", 8080), "ada:s%40cret")
    monkeypatch.setenv("HTTP_PROXY", "proxy.hospital")
    assert proxy_of(FAR, secured=False) == Proxy(Address("proxy.hospital", 3128))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_machine_is_reached_directly(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:1")
    assert proxy_of(Address(host, 7070), secured=True) is None


@pytest.mark.parametrize(
    ("excepted", "direct"),
    [("*", True), ("fed.example.org", True), (".example.org", True), ("a.org,example.org", True), ("other.org", False)],
)
def test_no_proxy_lists_what_is_reached_directly(excepted: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    monkeypatch.setenv("NO_PROXY", excepted)
    assert (proxy_of(FAR, secured=True) is None) == direct


@pytest.mark.parametrize(
    "text", ["socks5://proxy:1080", "https://proxy:1", "http://ada:secret@:1", "http://proxy:99999"]
)
def test_what_is_no_http_proxy_is_named_without_its_password(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", text)
    with pytest.raises(SettingsInvalid, match="is not http://HOST:PORT; correct the variable") as refused:
        proxy_of(FAR, secured=True)
    assert "secret" not in str(refused.value)


@asynccontextmanager
async def proxying(answer: bytes = b"") -> AsyncIterator[tuple[int, list[bytes]]]:
    """An HTTP proxy to which every host is this machine; `answer` is said in place of a connection."""
    asked: list[bytes] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header = await reader.readuntil(b"\r\n\r\n")
        asked.append(header)
        if answer:
            writer.write(answer)
            writer.close()
            return
        port = int(header.split()[1].rpartition(b":")[2])
        theirs, ours = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await asyncio.gather(pump(reader, ours), pump(theirs, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], asked


async def test_calls_go_through_it_by_the_name_that_only_it_can_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    async def echo(request: bytes, context: object) -> bytes:
        return request

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo, bytes, bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"Echo": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with proxying() as (where, asked):
        monkeypatch.setenv("HTTP_PROXY", f"http://ada:s%40cret@127.0.0.1:{where}")
        async with open_channel(f"fed.example.invalid:{port}") as channel:
            assert await channel.unary_unary("/s/Echo")(b"hello", timeout=20) == b"hello"
        assert await asyncio.to_thread(diagnose, f"fed.example.invalid:{port}", None) is None
        assert all(each.startswith(f"CONNECT fed.example.invalid:{port} HTTP/1.".encode()) for each in asked)
        assert all(base64.b64encode(b"ada:s@cret") in each for each in asked) and len(asked) == 2
    await server.stop(None)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            b"HTTP/1.1 403 Forbidden\r\n\r\n",
            "makes no connection to fed.example.invalid:7070 .HTTP 403.: ask who runs it",
        ),
        (b"HTTP/1.1 407 Authenticate\r\n\r\n", "wants a user and password: HTTPS_PROXY=http://USER:PASSWORD@127"),
        (b"nonsense", "does not answer when it is asked for fed.example.invalid:7070: check HTTPS_PROXY"),
    ],
)
async def test_a_proxy_that_lets_nothing_through_is_named(
    answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxying(answer) as (where, _):
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{where}")
        found = await asyncio.to_thread(diagnose, "fed.example.invalid:7070", None)
    assert found is not None and said.replace(".HTTP 403.", "(HTTP 403)") in str(found)


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    found = diagnose("fed.example.invalid:7070", None)
    assert "the proxy on the way to fed.example.invalid:7070 is not reached: the machine 127.0.0.1 is there" in str(
        found
    )
