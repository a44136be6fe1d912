"""The metrics port: Prometheus' own pages, on few threads, each for a short time, whoever connects."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

LOOK_S = 0.5
"""Interval of the check for connections that are over time, seconds."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the port.

    Attributes:
        connections: Connections at once, each with a thread.
        silence_s: Longest time before a connection has sent its request, seconds.
        life_s: Longest life of a connection, seconds.
        request_bytes: Longest request.
    """

    connections: int = 16
    silence_s: float = 5.0
    life_s: float = 30.0
    request_bytes: int = 8 * 1024


DEFAULT = Limits()


@dataclass
class _Since:
    """Start of a connection on the monotonic clock, and True once its request is there."""

    at: float = field(default_factory=time.monotonic)
    asked: bool = False


class MetricsServer(ThreadingMixIn, WSGIServer):
    """Serves /metrics within the bounds of a port.

    Notable: beyond the limit of connections, the oldest that has not asked for anything gives way to the new one, so
    that silent connections keep no scrape away.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64
    limits = DEFAULT

    def __init__(self, *arguments: Any) -> None:
        self._lock = threading.Lock()
        self._open: dict[socket.socket, _Since] = {}
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begins to serve a connection."""
        with self._lock:
            crowded = len(self._open) >= self.limits.connections
            if not crowded or self._make_room():
                self._open[request] = _Since()
                crowded = False
        if crowded:
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def asked(self, request: socket.socket) -> None:
        """Notes that the request of a connection is there."""
        with self._lock:
            if request in self._open:
                self._open[request].asked = True

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection."""
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Ends connections that were silent or open for too long; called again and again."""
        now = time.monotonic()
        with self._lock:
            for request, since in self._open.items():
                if now - since.at > (self.limits.life_s if since.asked else self.limits.silence_s):
                    _interrupt(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: who left, or sent no HTTP, is no fault of the daemon."""

    def _make_room(self) -> bool:
        """Ends the oldest connection that has asked for nothing, and takes it off the list."""
        silent = [request for request, since in self._open.items() if not since.asked]
        if not silent:
            return False
        _interrupt(silent[0])
        del self._open[silent[0]]
        return True


class _Handler(WSGIRequestHandler):
    """Reads a request of bounded length, and logs nothing."""

    server: MetricsServer

    def setup(self) -> None:
        """Bounds what is read, in time and bytes."""
        limits = self.server.limits
        self.request.settimeout(limits.life_s)
        super().setup()
        self.rfile = _Bounded(self.rfile, limits.request_bytes)  # type: ignore[assignment]

    def parse_request(self) -> bool:
        """Notes besides that there is a request."""
        found = super().parse_request()
        if found:
            self.server.asked(self.connection)
        return found

    def log_message(self, format: str, *args: Any) -> None:
        """Logs nothing."""


class _Bounded:
    """A file of which only so many bytes can be read."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._left = file, left

    def readline(self, size: int = -1) -> bytes:
        """Reads a line.

        Raises:
            OSError: If more is read than may be.
        """
        line: bytes = self._file.readline(self._left if size < 0 else min(size, self._left))
        self._left -= len(line)
        if self._left <= 0:
            raise OSError("the request is too long")
        return line

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def serve(registry: CollectorRegistry, host: str, port: int, within: Limits = DEFAULT) -> MetricsServer:
    """Serves a registry on a thread of its own, until `shutdown` and `server_close`.

    Raises:
        OSError: If the port cannot be had.
    """

    class Server(MetricsServer):
        address_family = socket.getaddrinfo(host, port)[0][0]
        limits = within

    server = make_server(host, port, make_wsgi_app(registry), Server, _Handler)
    threading.Thread(target=server.serve_forever, args=(LOOK_S,), daemon=True).start()
    return server


def _interrupt(request: socket.socket) -> None:
    with suppress(OSError):  # its caller has ended it already
        request.shutdown(socket.SHUT_RDWR)
