"""The metrics port: who connects and says nothing, or too much, keeps no scrape away and takes few threads."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from prometheus_client import CollectorRegistry, Gauge

from fedpeft.process import metrics_port
from fedpeft.process.metrics_port import Limits, MetricsServer

LIMITS = Limits(connections=4, silence_s=60, life_s=60, request_bytes=1024)
WAIT_S = 10.0
LARGE = 32 * 1024 * 1024
"""Bytes of an answer that no buffer of the system holds."""


@contextmanager
def serving(limits: Limits = LIMITS, *, answer_bytes: int = 0) -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Gauge("well", "Is it?" + "?" * answer_bytes, registry=registry).set(1)
    server = metrics_port.serve(registry, "127.0.0.1", 0, limits)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), WAIT_S)


def scrape(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=WAIT_S) as answer:
        return str(answer.read().decode())


def received(line: socket.socket) -> int:
    """Reads to the end of a connection and returns how many bytes came."""
    size = 0
    try:
        while data := line.recv(65_536):
            size += len(data)
    except ConnectionResetError:
        return size
    return size


def is_closed(line: socket.socket) -> bool:
    """Waits for the end of a connection."""
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("said", [b"", b"G", b"GET /metrics HTTP/1.1\r\nHost: x\r\n"], ids=["silent", "slow", "half"])
def test_who_holds_connections_without_asking_keeps_no_scrape_away(said: bytes) -> None:
    before = threading.active_count()
    with serving() as server, ExitStack() as stack:
        lines = [stack.enter_context(connect(server)) for _ in range(20 * LIMITS.connections)]
        for line in lines:
            try:
                line.sendall(said)
            except OSError:
                continue  # it has given way by now
        for _ in range(3):
            assert "well 1.0" in scrape(server)
        assert len(server._open) <= LIMITS.connections
        assert threading.active_count() - before <= LIMITS.connections + 5, "those that end are ending"
        assert is_closed(lines[0])


def test_at_its_limit_all_are_held_and_one_more_makes_the_oldest_give_way() -> None:
    with serving() as server, ExitStack() as stack:
        lines = [stack.enter_context(connect(server)) for _ in range(LIMITS.connections)]
        until(lambda: len(server._open) == LIMITS.connections)
        lines[0].setblocking(False)
        with pytest.raises(BlockingIOError):
            lines[0].recv(1)
        lines[0].settimeout(WAIT_S)
        stack.enter_context(connect(server))
        assert is_closed(lines[0])
        assert len(server._open) == LIMITS.connections


def until(reached: object) -> None:
    assert callable(reached)
    end = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_connection_that_says_nothing_is_closed_and_so_is_one_that_drips() -> None:
    with serving(Limits(silence_s=0.3)) as server, connect(server) as silent, connect(server) as dripping:
        begun = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < begun + WAIT_S:
                dripping.sendall(b"G")
                time.sleep(0.05)
        assert is_closed(silent)


def test_who_reads_no_answer_is_closed_too() -> None:
    with serving(Limits(life_s=0.3), answer_bytes=LARGE) as server, connect(server) as line:
        line.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        until(lambda: bool(server._open))
        until(lambda: not server._open)
        assert received(line) < LARGE, "the connection was closed before the answer was through"


@pytest.mark.parametrize("size", [LIMITS.request_bytes - 100, LIMITS.request_bytes + 100])
def test_a_request_has_so_many_bytes(size: int) -> None:
    with serving() as server, connect(server) as line:
        line.sendall(b"GET /metrics HTTP/1.0\r\nX: " + b"x" * (size - 30) + b"\r\n\r\n")
        answer = b""
        try:
            while data := line.recv(65_536):
                answer += data
        except ConnectionResetError:
            pass  # it was cut off before it had sent all
        assert (b"well 1.0" in answer) is (size < LIMITS.request_bytes)


def test_a_port_that_is_taken_is_an_error() -> None:
    with serving() as server, pytest.raises(OSError, match="in use"):
        metrics_port.serve(CollectorRegistry(), "127.0.0.1", server.server_port)
