"""The process at the port for enrolment: `python -m fedpeft_server.enrolment FD SOCKET TIMING`, started by the daemon.

FD is the listening socket, SOCKET the path of the daemon's own and TIMING its `Timing` as JSON. On standard input come
lines of JSON, each with the certificate and key to serve from then on; its end is that of this process. On standard
output go lines of JSON: ready, and then now and again the connections that were refused, by why.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from fedpeft.rpc import grpc_core
from fedpeft_server.access import bounds
from fedpeft_server.enrolment.connection_proxy import ConnectionProxy
from fedpeft_server.timing import Timing

OPEN_FILES = 1024
NICENESS = 5
"""The daemon's own work goes first."""


async def main(fd: int, daemon: str, timing: Timing) -> None:
    """Serves until standard input ends, or nobody has come for long."""
    import grpc  # only now: gRPC reads the environment as it is imported

    from fedpeft_server.enrolment.forwarding import Forwarding
    from fedpeft_server.rpc import connections

    lines = await _standard_input()
    pair = json.loads(await lines.readline())
    newer: list[dict[str, str]] = []

    def next_pair() -> grpc.ServerCertificateConfiguration | None:
        return _configuration(newer.pop()) if newer else None

    def _configuration(pems: dict[str, str]) -> grpc.ServerCertificateConfiguration:
        key, certificate = pems["key"].encode(), pems["certificate"].encode()
        return grpc.ssl_server_certificate_configuration([(key, certificate)])

    # In the daemon's folder, which the next daemon removes if both are killed.
    with tempfile.TemporaryDirectory(dir=Path(daemon).parent, ignore_cleanup_errors=True) as folder:
        own = str(Path(folder) / "grpc")
        credentials = grpc.dynamic_ssl_server_credentials(_configuration(pair), next_pair, False)  # type: ignore[arg-type]
        proxy = ConnectionProxy(own, timing)
        bound = bounds.CALLS["/fedpeft.v1.AccessService/Enroll"].message_bytes
        async with grpc.aio.insecure_channel(f"unix:{daemon}") as channel:
            server = grpc.aio.server(options=connections.options(bounds.ENROLMENT, bound))
            server.add_generic_rpc_handlers((Forwarding(channel, proxy.peer, timing),))
            server.add_secure_port(f"unix:{own}", credentials)
            await server.start()
            serving = asyncio.create_task(proxy.serve(socket.socket(fileno=fd)))
            _limit_memory()
            _say({"ready": os.getpid()})
            reporting = asyncio.create_task(_report(proxy, timing.enrolment_report_s))
            try:
                async with asyncio.TaskGroup() as group:
                    waiting = group.create_task(_idle(proxy, timing.enrolment_idle_s))
                    while line := await lines.readline():
                        newer[:] = [json.loads(line)]
                    waiting.cancel()
            except* _Idle:
                pass  # the end of this process; the daemon starts another for the next connection
            for task in (serving, reporting):
                task.cancel()
            await server.stop(0)


class _Idle(Exception):
    """Nobody has come for long."""


async def _idle(proxy: ConnectionProxy, most_s: float) -> None:
    while True:
        left = most_s - proxy.idle_s()
        if left <= 0:
            raise _Idle
        await asyncio.sleep(left)


async def _report(proxy: ConnectionProxy, pause_s: float) -> None:
    while True:
        await asyncio.sleep(pause_s)
        if proxy.refused:
            _say({"refused": dict(proxy.refused)})
            proxy.refused.clear()


async def _standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def _say(report: dict[str, object]) -> None:
    with suppress(OSError):  # the daemon is gone, which the end of standard input says too
        print(json.dumps(report), flush=True)


def _limit_files() -> None:
    """Bounds the open files of this process; a lower limit of the system stays, as only root may raise it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _limit_memory() -> None:
    """Bounds the memory that this process may take from now on; beyond it, it ends, and the daemon starts another."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            most = int(line.split()[1]) * 1024 + bounds.ENROLMENT_MEMORY
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    os.nice(NICENESS)
    _limit_files()
    grpc_core.configure()
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], Timing(**json.loads(sys.argv[3]))))
