"""Limits of connections: calls on one, and how many there are; nobody is refused for good."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.access import bounds

from ...ports import free_port
from ..conftest import StartDaemon, config

OPEN_FILES = 256


async def test_calls_beyond_the_limit_wait_on_their_connection_and_no_other(start: StartDaemon) -> None:
    daemon = await start()
    run = await daemon.create(config())
    watches = [daemon.operator.WatchRun(op.WatchRunRequest(run=run.id)) for _ in range(bounds.MAIN.streams or 0)]
    for watch in watches:
        assert await watch.read() is not grpc.aio.EOF
    late = asyncio.ensure_future(daemon.run(run.id))
    done, _ = await asyncio.wait({late}, timeout=0.5)
    assert not done
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{daemon.server.ports.port}", options=own) as other:
        answer = await health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watches[0].cancel()
    assert (await asyncio.wait_for(late, 5)).id == run.id


async def test_a_connection_that_nobody_uses_is_closed_and_the_next_call_opens_another(
    start: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAIN", replace(bounds.MAIN, idle_s=0.3))
    daemon = await start()
    run = await daemon.create(config())
    watch = daemon.operator.WatchRun(op.WatchRunRequest(run=run.id))
    assert await watch.read() is not grpc.aio.EOF
    await asyncio.sleep(1)
    assert daemon.channel.get_state() is grpc.ChannelConnectivity.READY, "somebody waits for news on it"
    watch.cancel()
    async with asyncio.timeout(5):
        await daemon.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    assert (await daemon.run(run.id)).id == run.id


@contextmanager
def few_files(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Runs a daemon that may open few files."""
    limits = f'ulimit -n {OPEN_FILES}; exec "$@"'
    flags = ["--data-dir", str(folder), "--listen", f"127.0.0.1:{port}", "--metrics", ""]
    command = ["bash", "-c", limits, "bash", sys.executable, "-m", "fedpeft_server", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        assert any('"serving"' in line for line in process.stderr), "the daemon ended"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_connections_leave_half_of_the_open_files_to_the_server(tmp_path: Path) -> None:
    port = free_port()
    with few_files(tmp_path, port) as daemon, ExitStack() as stack:
        several = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(OPEN_FILES)]
        assert sum(map(is_served, several)) == OPEN_FILES // 2
        assert len(os.listdir(f"/proc/{daemon.pid}/fd")) < OPEN_FILES - 50
        stack.close()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True).status
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(20) == 0


def is_served(connection: socket.socket) -> bool:
    """Says whether a server of HTTP/2 speaks, which it does first, or the connection was closed."""
    try:
        return bool(connection.recv(1))
    except ConnectionResetError:
        return False
