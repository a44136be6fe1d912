"""Supervisor: starts the process for enrolment when somebody comes, and another one when that ended.

Notable: the daemon binds the port and never takes a connection from it, so the address is known at once, a fault of the
process loses nobody who waits in line, and a server where nobody enrolls has no such process.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import structlog
from grpc_health.v1 import health_pb2

from fedpeft.process import durable
from fedpeft.process.addresses import Address
from fedpeft_server.access.bounds import Refusal
from fedpeft_server.access.certificates import ServerCertificates
from fedpeft_server.metrics import Metrics
from fedpeft_server.rpc.health import Health
from fedpeft_server.tasks import ended
from fedpeft_server.timing import Timing

log = structlog.get_logger()

SERVICE = "enrolment"
"""Its name in health checks."""
FOLDER = "fedpeft-enrolment"
"""Name, within that of a folder for temporary files, of the folder with the sockets of the daemon and the process."""
BACKLOG = 128
LINES_KEPT = 20
LINE_BYTES = 64 * 1024
LINE_LOGGED = 200
"""Characters of an ignored line that are logged."""


def bind(address: str) -> socket.socket:
    """Returns a listening socket.

    Raises:
        OSError: If the address cannot be had.
    """
    where = Address.parse(address, free=True)
    family, _, _, _, place = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)[0]
    both = family == socket.AF_INET6 and where.host == "::"
    return socket.create_server(place[:2], family=family, backlog=BACKLOG, dualstack_ipv6=both)


class Enrolment:
    """The process for enrolment.

    Args:
        listening: The bound port.
        own: Certificates with which it proves itself.
        health: Says whether it serves.
        metrics: Count how often it ended, and the connections that it refused.
        timing: Pauses before it is started again, and its time to end.

    Attributes:
        socket: Path of the socket on which the daemon takes the calls that the process hands on.
        process: The process; None while there is none.
    """

    def __init__(
        self,
        listening: socket.socket,
        own: ServerCertificates,
        health: Health,
        metrics: Metrics,
        timing: Timing,
    ) -> None:
        self._listening = listening
        self._own = own
        self._health = health
        self._metrics = metrics
        self._timing = timing
        self._folder = ExitStack()
        # Of mode 0700, so that only the daemon's user connects; what a killed daemon left is removed first.
        private = self._folder.enter_context(durable.scratch(Path(tempfile.gettempdir(), FOLDER)))
        self.socket = str(private / "daemon")
        self.process: asyncio.subprocess.Process | None = None
        self._last: deque[str] = deque(maxlen=LINES_KEPT)

    async def run(self) -> None:
        """Keeps a process there while it is needed, until cancelled."""
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        pause_s = self._timing.enrolment_first_pause_s
        while True:
            await self._somebody()
            begun = time.monotonic()
            code = await self._one_life()
            if code == 0:  # nobody came for long
                continue
            if time.monotonic() - begun > self._timing.enrolment_well_s:
                pause_s = self._timing.enrolment_first_pause_s
            self._metrics.enrolment_ends.inc()
            log.error("enrolment process ended; restarting", code=code, again_in_s=pause_s, last="\n".join(self._last))
            await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
            await asyncio.sleep(pause_s)
            await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)  # the port is, once somebody comes
            pause_s = min(2 * pause_s, self._timing.enrolment_longest_pause_s)

    def renewed(self) -> None:
        """Tells the process of the certificate to serve from now on."""
        if self.process and self.process.stdin:
            self.process.stdin.write(self._pair())

    async def close(self) -> None:
        """Ends the process."""
        if self.process:
            await self._end(self.process)
        self._listening.close()
        self._folder.close()

    async def _somebody(self) -> None:
        """Waits until a connection waits at the port."""
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._listening, came.set)
        try:
            await came.wait()
        finally:
            loop.remove_reader(self._listening)

    async def _one_life(self) -> int:
        """Starts the process and returns the code with which it ended."""
        self._last.clear()
        descriptor = self._listening.fileno()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "fedpeft_server.enrolment", str(descriptor), self.socket),
            json.dumps(asdict(self._timing)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(descriptor,),
            start_new_session=True,  # Ctrl-C is the daemon's, which lets enrolments end first
            limit=LINE_BYTES,
        )
        self.process = process
        try:
            self.renewed()
            assert process.stdout is not None
            async for line in _lines(process.stdout):
                await self._handle_line(line.decode(errors="replace").rstrip())
            return await process.wait()
        finally:
            self.process = None
            if process.returncode is None:
                await ended(asyncio.ensure_future(self._end(process)))

    async def _handle_line(self, line: str) -> None:
        """Takes up a line of the process; one that is no report is kept, for it may say why the process ends."""
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            self._last.append(line)
            return
        if not _is_report(report):
            log.warning("a line of the process for enrolment is no report and is ignored", line=line[:LINE_LOGGED])
            self._last.append(line)
            return
        if "ready" in report:
            log.info("enrolment process ready", pid=report["ready"])
            await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        refused = report.get("refused", {})
        for why, count in refused.items():
            self._metrics.enrolment_refused.labels(why).inc(count)
        if refused:
            log.warning("connections to the enrolment port were refused or cut off", why=refused)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        """Ends a process: by the end of its input, or by force."""
        if process.stdin:
            process.stdin.close()
        with suppress(TimeoutError):  # then by force
            async with asyncio.timeout(self._timing.enrolment_leave_s):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    def _pair(self) -> bytes:
        certificate, key = self._own.pair()
        return json.dumps({"certificate": certificate.decode(), "key": key.decode()}).encode() + b"\n"


async def _lines(output: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Yields the lines of a process; of one that is longer than `LINE_BYTES` some bytes are left out."""
    while True:
        try:
            line = await output.readline()
        except ValueError:
            log.warning("a line of the process for enrolment is too long and is ignored", limit_bytes=LINE_BYTES)
            continue
        if not line:
            return
        yield line


def _is_report(report: Any) -> bool:
    """Returns True if a value has the form that a report of the process has."""
    if not isinstance(report, dict) or not report.keys() <= {"ready", "refused"}:
        return False
    refused = report.get("refused", {})
    return isinstance(refused, dict) and all(
        why in set(Refusal) and type(count) is int and count >= 0 for why, count in refused.items()
    )
