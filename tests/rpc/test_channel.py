"""Channels: TLS 1.3 and nothing older, the authority's server and no other, no proxy, any address of a name."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from fedpeft.identity import certificates, folder, keys
from fedpeft.identity.authority import Authority
from fedpeft.identity.subject import Role, Subject
from fedpeft.rpc import channel

CALL = """
import asyncio, sys
from pathlib import Path
from fedpeft.rpc import grpc_core
grpc_core.configure()
import grpc
from fedpeft.rpc.channel import open_channel
from fedpeft.identity.folder import Identity

async def call():
    async with open_channel(sys.argv[1], Identity.load(Path(sys.argv[2]))) as channel:
        try:
            await channel.unary_unary("/a/b")(b"", timeout=20)
        except grpc.aio.AioRpcError as error:
            print(error.code().name, error.details())

asyncio.run(call())
"""


@contextmanager
def listening(authority: Authority, where: Path, newest: ssl.TLSVersion) -> Iterator[tuple[str, list[str]]]:
    """Makes one TLS handshake; yields the address and, once it is made or failed, what came of it."""
    key = keys.make()
    where.mkdir()
    (where / "key").write_bytes(keys.to_pem(key))
    own = authority.issue_server(["localhost"], key.public_key(), timedelta(days=1))
    (where / "certificate").write_bytes(certificates.to_pem(own))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = newest
    context.load_cert_chain(where / "certificate", where / "key")
    context.set_alpn_protocols(["h2"])
    made: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as line:
        line.settimeout(60)

        def serve() -> None:
            caller, _ = line.accept()
            try:
                with context.wrap_socket(caller, server_side=True) as secure:
                    made.append(str(secure.version()))
            except ssl.SSLError as error:
                made.append(str(error.reason))

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"localhost:{line.getsockname()[1]}", made
        thread.join()


@pytest.mark.parametrize(
    ("newest", "came"), [(ssl.TLSVersion.TLSv1_3, "TLSv1.3"), (ssl.TLSVersion.TLSv1_2, "NO_SHARED_CIPHER")]
)
def test_a_process_of_ours_speaks_nothing_older_than_tls_1_3(
    tmp_path: Path, newest: ssl.TLSVersion, came: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # gRPC reads this when it starts: a proxy that is not there, and that is not to be used.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("GRPC_SSL_CIPHER_SUITES", "ALL")
    authority = Authority.make("a federation")
    key = folder.take_key(tmp_path / "identity")
    chain = [authority.issue(Subject(Role.CLIENT, "noto"), key.public_key(), timedelta(days=1))]
    folder.write(tmp_path / "identity", "localhost:1", [authority.certificate], chain)
    with listening(authority, tmp_path / "server", newest) as (server, made):
        done = subprocess.run(
            [sys.executable, "-c", CALL, server, str(tmp_path / "identity")],
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stderr
    assert made == [came]
    assert done.stdout.startswith("UNAVAILABLE")


async def answering(number: int, stack: AsyncExitStack) -> int:
    """Starts a server that answers with its number; returns its port."""

    async def answer(request: bytes, context: object) -> bytes:
        return bytes([number])

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler("a", {"b": grpc.unary_unary_rpc_method_handler(answer)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return port


async def test_each_of_a_name_s_addresses_is_called_by_some_and_an_absent_one_by_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel, "_proxied", lambda *_, **__: ())  # several addresses are no HOST:PORT
    async with AsyncExitStack() as stack:
        ports = [await answering(number, stack) for number in range(3)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
        server = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        answered = set()
        for _ in range(60):
            async with channel.open_channel(server) as made:
                call = made.unary_unary("/a/b")
                first, second = await call(b"", timeout=20), await call(b"", timeout=20)
                assert first == second, "a connection goes on with its server"
                answered.add(first[0])
        assert answered == {0, 1, 2}
